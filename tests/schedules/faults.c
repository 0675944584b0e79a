/* Runs a program and makes some of its system calls fail, or wait, on demand:
 *
 *     faults RULES ring|no-ring PROGRAM ARGUMENT...
 *
 * A seccomp(2) filter hands the calls below to a supervising process, which looks into the file RULES at
 * each of them. Calls that the program makes without the C library are seen as well (a preloaded library
 * would miss them), but not what io_uring does by itself; with "no-ring" there is no io_uring. The program
 * keeps the process id. The supervisor ends with the last process that has the filter.
 *
 * RULES has lines of four words, of which the first that fits a call counts:
 *
 *     CALL ERRNO MILLISECONDS BYTES
 *
 * After so many milliseconds the call fails with that error, or, with 0, is carried out. CALL is one of
 *
 *     set     an extended attribute of more than BYTES bytes is set, or one is removed
 *     get     an extended attribute is read
 *     name    a file is made or renamed
 *     write   20 to 600 bytes are written to a file whose path contains ".state/"
 *     sync    fsync(2), fdatasync(2)
 *     zero    fallocate(2)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Calls that wait for their time. A server has fewer threads. */
#define WAITING_MAX 256
#define RECORD_MIN 20
#define RECORD_MAX 600

#if defined __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "unknown architecture"
#endif

struct waiting {
    uint64_t id;
    uint64_t due_ms;
    int error;
};

static struct waiting waiting[WAITING_MAX];
static int waiting_count;
static const char *rules_path;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(what) BPF_STMT(BPF_RET | BPF_K, what)
#define ON(call) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##call, 0, 1), RETURN(SECCOMP_RET_USER_NOTIF)
/* The low half of an argument, on a little-endian machine. */
#define ON_CREATE(call, argument)                                          \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##call, 0, 4), LOAD(argument), \
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_CREAT, 0, 1),               \
        RETURN(SECCOMP_RET_USER_NOTIF), RETURN(SECCOMP_RET_ALLOW)

static int install(int has_ring)
{
    struct sock_filter filter[] = {
        LOAD(arch),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0),
        RETURN(SECCOMP_RET_ALLOW),
        LOAD(nr),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
        RETURN(has_ring ? SECCOMP_RET_ALLOW : SECCOMP_RET_ERRNO | ENOSYS),
        ON(setxattr), ON(lsetxattr), ON(fsetxattr),
        ON(removexattr), ON(lremovexattr), ON(fremovexattr),
        ON(getxattr), ON(lgetxattr), ON(fgetxattr),
        ON(renameat), ON(renameat2), ON(linkat),
        ON(fsync), ON(fdatasync), ON(fallocate),
#ifdef __NR_rename
        ON(rename),
        ON_CREATE(open, args[1]),
#endif
        ON_CREATE(openat, args[2]),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_write, 0, 4),
        LOAD(args[2]),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, RECORD_MIN, 0, 2),
        BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, RECORD_MAX, 1, 0),
        RETURN(SECCOMP_RET_USER_NOTIF),
        RETURN(SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        die("faults: no_new_privs");
    int listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    if (listener < 0)
        die("faults: seccomp");
    return listener;
}

/* The name of a call in the rules, if it is one that they can be about. */
static const char *class_of(const struct seccomp_notif *call, uint64_t *bytes)
{
    *bytes = UINT64_MAX;
    switch (call->data.nr) {
    case __NR_setxattr:
    case __NR_lsetxattr:
    case __NR_fsetxattr:
        *bytes = call->data.args[3];
        return "set";
    case __NR_removexattr:
    case __NR_lremovexattr:
    case __NR_fremovexattr:
        return "set";
    case __NR_getxattr:
    case __NR_lgetxattr:
    case __NR_fgetxattr:
        return "get";
    case __NR_fsync:
    case __NR_fdatasync:
        return "sync";
    case __NR_fallocate:
        return "zero";
    case __NR_write: {
        char link[64], path[4096];
        snprintf(link, sizeof link, "/proc/%u/fd/%u", call->pid, (unsigned)call->data.args[0]);
        ssize_t length = readlink(link, path, sizeof path - 1);
        path[length < 0 ? 0 : length] = 0;
        return strstr(path, ".state/") ? "write" : NULL;
    }
    default:
        return "name";
    }
}

static void answer(int listener, uint64_t id, int error)
{
    struct seccomp_notif_resp reply = {.id = id};
    if (error)
        reply.error = -error;
    else
        reply.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    /* Of a thread that was killed, or of a call that a signal interrupted, nobody wants to hear. */
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &reply);
}

static void judge(int listener, const struct seccomp_notif *call)
{
    uint64_t bytes;
    const char *class = class_of(call, &bytes);
    FILE *rules = class ? fopen(rules_path, "re") : NULL;
    char name[16];
    int error = 0, delay = 0, found_error, found_delay;
    unsigned long long longer;
    while (rules && fscanf(rules, "%15s %d %d %llu", name, &found_error, &found_delay, &longer) == 4) {
        if (strcmp(name, class) == 0 && bytes > longer) {
            error = found_error;
            delay = found_delay;
            break;
        }
    }
    if (rules)
        fclose(rules);
    if (delay > 0 && waiting_count < WAITING_MAX)
        waiting[waiting_count++] = (struct waiting){call->id, now_ms() + delay, error};
    else
        answer(listener, call->id, error);
}

/* Milliseconds until the next call is due; -1 for never. */
static int answer_due(int listener)
{
    uint64_t now = now_ms(), next = UINT64_MAX;
    for (int i = 0; i < waiting_count;) {
        if (waiting[i].due_ms <= now) {
            answer(listener, waiting[i].id, waiting[i].error);
            waiting[i] = waiting[--waiting_count];
            continue;
        }
        if (waiting[i].due_ms < next)
            next = waiting[i].due_ms;
        i++;
    }
    return next == UINT64_MAX ? -1 : (int)(next - now);
}

static void supervise(int listener)
{
    for (;;) {
        struct pollfd ready = {listener, POLLIN, 0};
        poll(&ready, 1, answer_due(listener));
        if (ready.revents & POLLHUP)
            return;
        if (ready.revents & POLLIN) {
            struct seccomp_notif call;
            memset(&call, 0, sizeof call);
            if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) == 0)
                judge(listener, &call);
        }
    }
}

static int receive(int socket)
{
    char byte, space[CMSG_SPACE(sizeof(int))];
    struct iovec one = {&byte, 1};
    struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    if (recvmsg(socket, &message, 0) != 1 || !CMSG_FIRSTHDR(&message))
        exit(1);
    int listener;
    memcpy(&listener, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof listener);
    return listener;
}

static void hand_on(int socket, int listener)
{
    char byte = 0, space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec one = {&byte, 1};
    struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof listener);
    memcpy(CMSG_DATA(head), &listener, sizeof listener);
    if (sendmsg(socket, &message, 0) != 1)
        die("faults: sendmsg");
}

int main(int argc, char **argv)
{
    int pair[2];
    if (argc < 4) {
        fprintf(stderr, "usage: faults RULES ring|no-ring PROGRAM ARGUMENT...\n");
        return 2;
    }
    rules_path = argv[1];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
        die("faults: socketpair");
    /* A grandchild: the program has no children that it does not know of. */
    pid_t child = fork();
    if (child < 0)
        die("faults: fork");
    if (child == 0) {
        if (fork() != 0)
            _exit(0);
        int nothing = open("/dev/null", O_RDWR);
        for (int fd = 0; fd < 3; fd++)
            dup2(nothing, fd);
        close(pair[1]);
        supervise(receive(pair[0]));
        _exit(0);
    }
    waitpid(child, NULL, 0);
    close(pair[0]);
    int listener = install(strcmp(argv[2], "ring") == 0);
    hand_on(pair[1], listener);
    close(listener);
    close(pair[1]);
    execvp(argv[3], argv + 3);
    die(argv[3]);
}
