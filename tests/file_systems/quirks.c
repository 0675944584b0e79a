/* Preloaded into the server under test: defects and limits of some file systems.
 *
 *     QUIRK_FALLOCATE=N      fallocate(2) and BLKDISCARD fail with error number N, and do nothing
 *     QUIRK_SEEK=hole        SEEK_DATA finds no data
 *     QUIRK_SEEK=stuck       SEEK_DATA and SEEK_HOLE return the offset of the call
 *     QUIRK_SEEK=back        they return an offset before that of the call
 *     QUIRK_SEEK=striped     they return results as if every other 4096 bytes were a hole
 *     QUIRK_TYPE=HEX         fstatfs(2) returns this type of file system
 *     QUIRK_SEEK_COUNT=FILE  each SEEK_DATA or SEEK_HOLE appends a byte to FILE
 */
#include "../harness/preload.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>

static int fallocate_fails(void)
{
    const char *number = getenv("QUIRK_FALLOCATE");
    if (number)
        errno = atoi(number);
    return number != NULL;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    return fallocate_fails() ? -1 : NEXT(fallocate, fd, mode, offset, length);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    return fallocate_fails() ? -1 : NEXT(fallocate64, fd, mode, offset, length);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request == BLKDISCARD && fallocate_fails())
        return -1;
    return NEXT(ioctl, fd, request, argument);
}

int fstatfs(int fd, struct statfs *found)
{
    int result = NEXT(fstatfs, fd, found);
    if (getenv("QUIRK_TYPE"))
        found->f_type = strtoul(getenv("QUIRK_TYPE"), NULL, 16);
    return result;
}

int fstatfs64(int fd, struct statfs64 *found)
{
    int result = NEXT(fstatfs64, fd, found);
    if (getenv("QUIRK_TYPE"))
        found->f_type = strtoul(getenv("QUIRK_TYPE"), NULL, 16);
    return result;
}

static void count_seek(void)
{
    const char *path = getenv("QUIRK_SEEK_COUNT");
    int fd = path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd >= 0) {
        if (write(fd, ".", 1) != 1)
            abort();
        close(fd);
    }
}

/* Whether to replace the result by *result: an offset, or -1 with errno set. */
static int replace_seek(off64_t offset, int whence, off64_t *result)
{
    const char *how = getenv("QUIRK_SEEK");
    if (!how || (whence != SEEK_DATA && whence != SEEK_HOLE))
        return 0;
    count_seek();
    if (strcmp(how, "hole") == 0) {
        errno = ENXIO;
        *result = whence == SEEK_DATA ? -1 : offset;
    } else if (strcmp(how, "striped") == 0) {
        int parity = whence == SEEK_HOLE;
        off64_t block = offset / 4096;
        *result = block % 2 == parity ? offset : (block + 1) * 4096;
    } else {
        off64_t before = offset > 4096 ? offset - 4096 : 0;
        *result = strcmp(how, "back") == 0 ? before : offset;
    }
    return 1;
}

off_t lseek(int fd, off_t offset, int whence)
{
    off64_t result;
    return replace_seek(offset, whence, &result) ? result : NEXT(lseek, fd, offset, whence);
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
    off64_t result;
    return replace_seek(offset, whence, &result) ? result : NEXT(lseek64, fd, offset, whence);
}
