/* Preloaded into the server under test: locks of one kind fail, as on some file systems.
 *
 * FAILING_LOCK is "flock" or "fcntl"; FAILING_ERRNO is the error number.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static int fails(const char *kind)
{
    const char *failing = getenv("FAILING_LOCK");
    if (!failing || strcmp(failing, kind) != 0)
        return 0;
    errno = atoi(getenv("FAILING_ERRNO"));
    return 1;
}

int flock(int fd, int operation)
{
    int (*next)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    return fails("flock") ? -1 : next(fd, operation);
}

static int control(const char *name, int fd, int command, void *argument)
{
    int (*next)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, name);
    return command == F_OFD_SETLK && fails("fcntl") ? -1 : next(fd, command, argument);
}

#define CONTROL(name)                                    \
    int name(int fd, int command, ...)                   \
    {                                                    \
        va_list rest;                                    \
        va_start(rest, command);                         \
        void *argument = va_arg(rest, void *);           \
        va_end(rest);                                    \
        return control(#name, fd, command, argument);    \
    }

CONTROL(fcntl)
CONTROL(fcntl64)
