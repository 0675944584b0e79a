/* Preloaded into the server under test: counts the calls that make data durable, and fails them on
 * demand.
 *
 * FAILING_FSYNC_DIR names a directory. Each call appends a byte to its file "count"; while its file
 * "fail" exists, each call fails with EIO and does nothing.
 */
#include "../harness/preload.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>

static int fails(void)
{
    const char *dir = getenv("FAILING_FSYNC_DIR");
    char path[4096];
    if (!dir)
        return 0;
    snprintf(path, sizeof path, "%s/count", dir);
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0) {
        if (write(fd, ".", 1) != 1)
            abort();
        close(fd);
    }
    snprintf(path, sizeof path, "%s/fail", dir);
    if (access(path, F_OK) != 0)
        return 0;
    errno = EIO;
    return 1;
}

int fsync(int fd)
{
    return fails() ? -1 : NEXT(fsync, fd);
}

int fdatasync(int fd)
{
    return fails() ? -1 : NEXT(fdatasync, fd);
}

int msync(void *start, size_t length, int flags)
{
    return fails() ? -1 : NEXT(msync, start, length, flags);
}

ssize_t pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    if ((flags & (RWF_DSYNC | RWF_SYNC)) && fails())
        return -1;
    return NEXT(pwritev2, fd, pieces, count, offset, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *pieces, int count, off64_t offset, int flags)
{
    if ((flags & (RWF_DSYNC | RWF_SYNC)) && fails())
        return -1;
    return NEXT(pwritev64v2, fd, pieces, count, offset, flags);
}
