/* Preloaded into the server under test: imitates defects and limits of some file systems.
 *
 *     ODD_FALLOCATE=N      fallocate(2) and BLKDISCARD fail with error number N, and do nothing
 *     ODD_SEEK=hole        SEEK_DATA finds no data at all
 *     ODD_SEEK=stuck       SEEK_DATA and SEEK_HOLE return the offset of the call
 *     ODD_SEEK=back        ... an offset before that of the call
 *     ODD_SEEK=striped     ... as if every other 4096 bytes were a hole
 *     ODD_TYPE=HEX         fstatfs(2) finds a file system of this type
 *     ODD_SEEK_COUNT=FILE  each such call appends a byte to FILE
 */
#include "../harness/preload.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>

static int unable(void)
{
    const char *number = getenv("ODD_FALLOCATE");
    if (number)
        errno = atoi(number);
    return number != NULL;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    return unable() ? -1 : NEXT(fallocate, fd, mode, offset, length);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    return unable() ? -1 : NEXT(fallocate64, fd, mode, offset, length);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request == BLKDISCARD && unable())
        return -1;
    return NEXT(ioctl, fd, request, argument);
}

int fstatfs(int fd, struct statfs *found)
{
    int result = NEXT(fstatfs, fd, found);
    if (getenv("ODD_TYPE"))
        found->f_type = strtoul(getenv("ODD_TYPE"), NULL, 16);
    return result;
}

int fstatfs64(int fd, struct statfs64 *found)
{
    int result = NEXT(fstatfs64, fd, found);
    if (getenv("ODD_TYPE"))
        found->f_type = strtoul(getenv("ODD_TYPE"), NULL, 16);
    return result;
}

static void count(void)
{
    const char *path = getenv("ODD_SEEK_COUNT");
    int fd = path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd >= 0) {
        if (write(fd, ".", 1) != 1)
            abort();
        close(fd);
    }
}

/* Whether the result is replaced; *answer is then the offset, or -1 with errno set. */
static int odd_seek(off64_t offset, int whence, off64_t *answer)
{
    const char *how = getenv("ODD_SEEK");
    if (!how || (whence != SEEK_DATA && whence != SEEK_HOLE))
        return 0;
    count();
    if (strcmp(how, "hole") == 0) {
        errno = ENXIO;
        *answer = whence == SEEK_DATA ? -1 : offset;
    } else if (strcmp(how, "striped") == 0) {
        int wanted = whence == SEEK_HOLE;
        off64_t block = offset / 4096;
        *answer = block % 2 == wanted ? offset : (block + 1) * 4096;
    } else {
        off64_t before = offset > 4096 ? offset - 4096 : 0;
        *answer = strcmp(how, "back") == 0 ? before : offset;
    }
    return 1;
}

off_t lseek(int fd, off_t offset, int whence)
{
    off64_t answer;
    return odd_seek(offset, whence, &answer) ? answer : NEXT(lseek, fd, offset, whence);
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
    off64_t answer;
    return odd_seek(offset, whence, &answer) ? answer : NEXT(lseek64, fd, offset, whence);
}
