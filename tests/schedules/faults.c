/* Runs a program and makes some of its system calls fail, or wait, on demand:
 *
 *     faults RULES ring|no-ring PROGRAM ARGUMENT...
 *
 * A seccomp(2) filter passes the calls below to a supervising process, which reads the file RULES at each
 * of them. The filter also sees calls that bypass the C library, which a preloaded library would miss. It
 * does not see operations of io_uring; "no-ring" disables io_uring (ENOSYS). The program keeps its process
 * id. The supervisor exits with the last process that has the filter.
 *
 * RULES has lines of four words; the first line that matches a call applies:
 *
 *     CALL ERRNO MILLISECONDS BYTES
 *
 * After MILLISECONDS the call fails with ERRNO or, if ERRNO is 0, is executed. CALL is one of
 *
 *     setxattr   sets an extended attribute of more than BYTES bytes, or removes one
 *     getxattr   reads an extended attribute
 *     create     creates, links or renames a file
 *     write      writes 20 to 600 bytes to a file whose path contains ".state/"
 *     sync       fsync(2), fdatasync(2)
 *     fallocate  fallocate(2)
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

/* Delayed calls at the same time. A server has fewer threads. */
#define DELAYED_MAX 256
/* The size of a record, in bytes. */
#define RECORD_BYTES_MIN 20
#define RECORD_BYTES_MAX 600

#if defined __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "unknown architecture"
#endif

/* A call that the supervisor answers at `due_ms`. */
struct delayed {
    uint64_t id;
    uint64_t due_ms;
    int error;
};

static struct delayed delayed[DELAYED_MAX];
static int delayed_count;
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
#define NOTIFY(call) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##call, 0, 1), RETURN(SECCOMP_RET_USER_NOTIF)
/* Loads the low half of the flags, on a little-endian machine. */
#define NOTIFY_IF_O_CREAT(call, argument)                                   \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##call, 0, 4), LOAD(argument), \
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_CREAT, 0, 1),                \
        RETURN(SECCOMP_RET_USER_NOTIF), RETURN(SECCOMP_RET_ALLOW)

/* Installs the filter; returns the descriptor at which the supervisor receives the calls. */
static int install_filter(int has_ring)
{
    struct sock_filter filter[] = {
        LOAD(arch),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0),
        RETURN(SECCOMP_RET_ALLOW),
        LOAD(nr),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
        RETURN(has_ring ? SECCOMP_RET_ALLOW : SECCOMP_RET_ERRNO | ENOSYS),
        NOTIFY(setxattr), NOTIFY(lsetxattr), NOTIFY(fsetxattr),
        NOTIFY(removexattr), NOTIFY(lremovexattr), NOTIFY(fremovexattr),
        NOTIFY(getxattr), NOTIFY(lgetxattr), NOTIFY(fgetxattr),
        NOTIFY(renameat), NOTIFY(renameat2), NOTIFY(linkat),
        NOTIFY(fsync), NOTIFY(fdatasync), NOTIFY(fallocate),
#ifdef __NR_rename
        NOTIFY(rename),
        NOTIFY_IF_O_CREAT(open, args[1]),
#endif
        NOTIFY_IF_O_CREAT(openat, args[2]),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_write, 0, 4),
        LOAD(args[2]),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, RECORD_BYTES_MIN, 0, 2),
        BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, RECORD_BYTES_MAX, 1, 0),
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

/* The class of a call in the rules, or NULL if the rules do not cover it. */
static const char *class_of(const struct seccomp_notif *call, uint64_t *bytes)
{
    *bytes = UINT64_MAX;
    switch (call->data.nr) {
    case __NR_setxattr:
    case __NR_lsetxattr:
    case __NR_fsetxattr:
        *bytes = call->data.args[3];
        return "setxattr";
    case __NR_removexattr:
    case __NR_lremovexattr:
    case __NR_fremovexattr:
        return "setxattr";
    case __NR_getxattr:
    case __NR_lgetxattr:
    case __NR_fgetxattr:
        return "getxattr";
    case __NR_fsync:
    case __NR_fdatasync:
        return "sync";
    case __NR_fallocate:
        return "fallocate";
    case __NR_write: {
        char link[64], path[4096];
        snprintf(link, sizeof link, "/proc/%u/fd/%u", call->pid, (unsigned)call->data.args[0]);
        ssize_t length = readlink(link, path, sizeof path - 1);
        path[length < 0 ? 0 : length] = 0;
        return strstr(path, ".state/") ? "write" : NULL;
    }
    default:
        return "create";
    }
}

static void answer(int listener, uint64_t id, int error)
{
    struct seccomp_notif_resp reply = {.id = id};
    if (error)
        reply.error = -error;
    else
        reply.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    /* Fails if the thread was killed or a signal interrupted the call: then no caller waits. */
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &reply);
}

/* Answers a call by the rules, at once or later. */
static void handle_call(int listener, const struct seccomp_notif *call)
{
    uint64_t bytes;
    const char *class = class_of(call, &bytes);
    FILE *rules = class ? fopen(rules_path, "re") : NULL;
    char name[16];
    int error = 0, delay = 0, rule_error, rule_delay;
    unsigned long long bytes_allowed_max;
    while (rules && fscanf(rules, "%15s %d %d %llu", name, &rule_error, &rule_delay, &bytes_allowed_max) == 4) {
        if (strcmp(name, class) == 0 && bytes > bytes_allowed_max) {
            error = rule_error;
            delay = rule_delay;
            break;
        }
    }
    if (rules)
        fclose(rules);
    if (delay > 0 && delayed_count < DELAYED_MAX)
        delayed[delayed_count++] = (struct delayed){call->id, now_ms() + delay, error};
    else
        answer(listener, call->id, error);
}

/* Answers the calls that are due. Returns the milliseconds until the next one; -1 without one. */
static int answer_due(int listener)
{
    uint64_t now = now_ms(), next = UINT64_MAX;
    for (int i = 0; i < delayed_count;) {
        if (delayed[i].due_ms <= now) {
            answer(listener, delayed[i].id, delayed[i].error);
            delayed[i] = delayed[--delayed_count];
            continue;
        }
        if (delayed[i].due_ms < next)
            next = delayed[i].due_ms;
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
                handle_call(listener, &call);
        }
    }
}

static int receive_listener(int socket)
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

static void send_listener(int socket, int listener)
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
    /* A grandchild supervises, so that the program gets no unexpected child. */
    pid_t child = fork();
    if (child < 0)
        die("faults: fork");
    if (child == 0) {
        if (fork() != 0)
            _exit(0);
        int null = open("/dev/null", O_RDWR);
        for (int fd = 0; fd < 3; fd++)
            dup2(null, fd);
        close(pair[1]);
        supervise(receive_listener(pair[0]));
        _exit(0);
    }
    waitpid(child, NULL, 0);
    close(pair[0]);
    int listener = install_filter(strcmp(argv[2], "ring") == 0);
    send_listener(pair[1], listener);
    close(listener);
    close(pair[1]);
    execvp(argv[3], argv + 3);
    die(argv[3]);
}
