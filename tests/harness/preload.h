/* For the libraries that tests preload into the server. Hides io_uring: the kernel executes its
 * submissions without calls through libc, so that no preloaded function would see them.
 *
 * Include it first; link with -ldl.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Calls the function of libc that this library replaces. */
#define NEXT(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)

long syscall(long number, ...)
{
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_io_uring_setup) {
        errno = ENOSYS;
        return -1;
    }
    return NEXT(syscall, number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
