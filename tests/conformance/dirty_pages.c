/* Prints how many pages of a range of a file are dirty or under write-back:
 *
 *     dirty_pages FILE OFFSET LENGTH
 *
 * Exits with 2 if the kernel cannot tell (cachestat(2), since Linux 6.5).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

int main(int argc, char **argv)
{
    if (argc != 4)
        return 1;
    uint64_t range[2] = {strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10)};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } found;
    int fd = open(argv[1], O_RDONLY);
    if (fd < 0)
        return 1;
    if (syscall(SYS_cachestat, fd, range, &found, 0) != 0)
        return errno == ENOSYS || errno == EPERM ? 2 : 1;
    printf("%llu\n", (unsigned long long)(found.dirty + found.writeback));
    return 0;
}
