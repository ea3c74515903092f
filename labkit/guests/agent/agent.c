/*
 * labkit-agent: runs commands inside a guest for the host, over virtio-serial ports.
 *
 *     cc -static -Os -o labkit-agent agent.c
 *
 *     labkit-agent                    serve every port named org.labkit.N, as they come and go
 *     labkit-agent --fd 3 [--fd 4]    serve descriptors that are open already (tests); ends when all are closed
 *
 * Protocol, version 1 (the other end is labkit/channel/protocol.py, which says the same):
 *
 *   A frame is
 *       type u8 | session u32 | number u32 | job u32 | payload | crc32 u32
 *   in little-endian order, the CRC being zlib's over all that precedes it. Frames are escaped as RFC 1055 (SLIP)
 *   has it and stand between two END bytes, so that whoever was frozen in mid-frame by a snapshot is in step again
 *   at the next END. Frames that are damaged or too long are dropped. Each side numbers the frames that it sends
 *   in a session, from 0 (HELLO, HELLO_ACK); a number out of turn shows that the guest was reverted to a time at
 *   which it knew the session already, and that something was lost or is said twice.
 *
 *   HELLO and HELLO_ACK keep this form in all versions, so that two that differ can say so.
 *
 *   type          direction  payload
 *    1 HELLO      to guest   nonce, 16 bytes; session is its first four. The port's earlier client is gone:
 *                            its jobs are killed and forgotten, what was on its way to it is dropped
 *    2 HELLO_ACK  to host    nonce | version u16 | agent's pid u32 | CLOCK_REALTIME ns u64 | CLOCK_MONOTONIC ns
 *                            u64 | boot id, as text
 *    3 EXEC       to guest   flags u8 (1: it has standard input) | argc u32 | envc u32 | cwd | arguments |
 *                            NAME=value pairs; each text ends with NUL. At most 1 MiB
 *    4 STDIN      to guest   data; at most the credit that is left, which begins at 128 KiB
 *    5 STDIN_EOF  to guest
 *    6 CREDIT     to host    u32: the command took so many more bytes of its standard input
 *    7 STDOUT     to host    data, at most 32 KiB
 *    8 STDERR     to host    likewise
 *    9 SIGNAL     to guest   u32: the signal for the job's whole process group
 *   10 EXIT       to host    u32: its wait status; the last frame of a job
 *   11 PING       to guest   any, at most 64 bytes
 *   12 PONG       to host    u8: whether the job is known | PING's payload
 *   13 RESEED     to guest   random bytes, stirred into the kernel's pool and credited
 *   14 SETTIME    to guest   u64: CLOCK_REALTIME in ns
 *   15 DONE       to host    u32: errno of a RESEED or SETTIME, 0 where it worked
 *   16 STALE      to host    u8: the type of a frame, of that session and job, that did nothing here: the session
 *                            is not known (any more), or the frame is out of turn. Not numbered itself
 *
 * A job ends when its direct child has ended and both its pipes are at their end. A process left in the background
 * may hold them open (`sleep 1000 &`); so after the child's end what the pipes hold is delivered, and EXIT follows
 * as soon as they have been quiet for 150 ms, or after 1 s of foreign chatter. From then on what the background
 * writes is read and thrown away, so that it does not die of SIGPIPE.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/netlink.h>
#include <linux/random.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian, and so must be the guest"
#endif

enum { VERSION = 1 };
enum {
    HELLO = 1, HELLO_ACK, EXEC, STDIN, STDIN_EOF, CREDIT, STDOUT, STDERR, SIGNAL, EXIT,
    PING, PONG, RESEED, SETTIME, DONE, STALE,
};
enum { END = 0xC0, ESC = 0xDB, ESC_END = 0xDC, ESC_ESC = 0xDD };

enum {
    HEADER = 13,                               /* type, session, number, job */
    CRC = 4,
    DATA_MAX = 32 * 1024,                      /* of output in a frame */
    FRAME_MAX = 1024 * 1024 + HEADER + CRC,    /* that is taken: EXEC's are long */
    STDIN_WINDOW = 128 * 1024,
    CREDIT_STEP = 32 * 1024,
    DATA_ROOM = 2 * (HEADER + DATA_MAX + CRC) + 2, /* a data frame, with every byte escaped */
    CONTROL_ROOM = 2 * 1024,                   /* likewise any other frame */
    OUT_SIZE = 2 * DATA_ROOM + 4 * CONTROL_ROOM,
    IN_SIZE = 32 * 1024,
    JOBS_MAX = 64,                             /* of a port */
    DRAINS_MAX = 64,                           /* jobs that ended with their pipes held open */
    QUIET_MS = 150,
    CHATTER_MS = 1000,
    AWAY_MS = 2000,                            /* a host that is gone for so long abandons its jobs */
    RESCAN_MS = 500,
};

#define PORT_NAME "org.labkit."
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* What an epoll event points at. */
struct watch {
    enum { WATCH_CHILDREN, WATCH_UEVENTS, WATCH_PORT, WATCH_STREAM, WATCH_INPUT } kind;
    void *owner;
};

struct port {
    struct port *next;
    struct watch watch;
    int fd;                    /* -1 once it is gone */
    bool fixed;                /* a socket (--fd): its end is final */
    char device[32];           /* vport0p1; "" where fixed */
    bool readable, writable;   /* since epoll is edge-triggered, what it said last */
    int64_t away_since;        /* ms; 0 while the host is there */
    bool greeted;
    uint32_t session;
    uint32_t sent, expected;   /* the numbers of the next frames out and in */
    uint8_t *frame;            /* being taken in; FRAME_MAX bytes */
    size_t frame_len;
    bool escaped, spoilt;
    uint8_t in[IN_SIZE];       /* read, but not taken apart yet */
    size_t in_pos, in_len;
    uint8_t out[OUT_SIZE];     /* escaped frames that wait for the port */
    size_t out_pos, out_len;
    unsigned jobs;
};

struct stream {
    struct watch watch;
    int fd; /* -1 at its end */
    bool readable;
    size_t owed; /* bytes the child had written when it ended, and that are not delivered yet */
};

struct job {
    struct job *next;
    struct port *port;         /* NULL once nobody asks for it any more */
    uint32_t id;
    pid_t pid;                 /* 0 once it is reaped */
    int status;
    int64_t ended, heard;      /* ms: when it was reaped; when output last came after that */
    struct stream streams[2];  /* its standard output, standard error */
    struct watch input_watch;
    int input;                 /* -1 where it has none, or none any more */
    bool input_ready, input_eof;
    uint8_t *pending;          /* standard input that the child has not taken yet; STDIN_WINDOW bytes */
    size_t pending_pos, pending_len;
    size_t taken;              /* bytes that CREDIT has not told of yet */
};

static struct port *ports;
static struct job *jobs; /* newest first */
static int epoll_fd, signal_fd, uevent_fd = -1, null_fd;
static int64_t rescan_at; /* ms; 0 for never */
static uint32_t crc_table[8][256];
extern char **environ;

static int64_t clock_ns(clockid_t which)
{
    struct timespec t;
    clock_gettime(which, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t now_ms(void)
{
    return clock_ns(CLOCK_MONOTONIC) / 1000000;
}

static void die(const char *what)
{
    fprintf(stderr, "labkit-agent: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void watch(int fd, uint32_t events, struct watch *watch)
{
    struct epoll_event event = {.events = events, .data.ptr = watch};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        fprintf(stderr, "labkit-agent: epoll: %s\n", strerror(errno));
}

static void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- framing ------------------------------------------------------------------------------------------------- */

/* Eight bytes a step ("slicing by 8"), since a bytewise CRC is half of the agent's work under emulation. */
static void crc_init(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? c >> 1 ^ 0xEDB88320u : c >> 1;
        crc_table[0][i] = c;
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++)
            crc_table[k][i] = crc_table[k - 1][i] >> 8 ^ crc_table[0][crc_table[k - 1][i] & 0xFF];
}

static uint32_t crc_update(uint32_t crc, const uint8_t *p, size_t n)
{
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++)
            crc ^= crc_table[7 - k][word >> 8 * k & 0xFF];
    }
    while (n--)
        crc = crc >> 8 ^ crc_table[0][(crc ^ *p++) & 0xFF];
    return crc;
}

static uint64_t has_byte(uint64_t word, uint8_t byte)
{
    word ^= 0x0101010101010101u * byte;
    return (word - 0x0101010101010101u) & ~word & 0x8080808080808080u;
}

/* How many bytes at p are neither END nor ESC, up to n. */
static size_t plain(const uint8_t *p, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, p + i, 8);
        if (has_byte(word, END) | has_byte(word, ESC))
            break;
    }
    while (i < n && p[i] != END && p[i] != ESC)
        i++;
    return i;
}

static uint32_t get32(const uint8_t *p)
{
    uint32_t value;
    memcpy(&value, p, 4);
    return value;
}

static bool has_room(const struct port *port, size_t room)
{
    return OUT_SIZE - (port->out_len - port->out_pos) >= room;
}

static void put_escaped(struct port *port, const uint8_t *p, size_t n)
{
    uint8_t *out = port->out + port->out_len;
    while (n) {
        size_t run = plain(p, n);
        memcpy(out, p, run);
        out += run, p += run, n -= run;
        if (n) {
            *out++ = ESC;
            *out++ = *p++ == END ? ESC_END : ESC_ESC;
            n--;
        }
    }
    port->out_len = out - port->out;
}

/* Queue a frame; dropped if the port has no room, which callers that must not lose it have made sure of. */
static void send_frame(struct port *port, uint8_t type, uint32_t session, uint32_t job, const void *payload, size_t n)
{
    uint8_t header[HEADER] = {type};
    size_t most = 2 * (HEADER + n + CRC) + 2;
    uint32_t number = 0, crc;
    if (!has_room(port, most))
        return;
    if (OUT_SIZE - port->out_len < most) { /* what is left of the queue moves to the front */
        port->out_len -= port->out_pos;
        memmove(port->out, port->out + port->out_pos, port->out_len);
        port->out_pos = 0;
    }
    if (type != STALE)
        number = port->sent++;
    memcpy(header + 1, &session, 4);
    memcpy(header + 5, &number, 4);
    memcpy(header + 9, &job, 4);
    crc = ~crc_update(crc_update(~0u, header, HEADER), payload, n);
    port->out[port->out_len++] = END;
    put_escaped(port, header, HEADER);
    put_escaped(port, payload, n);
    put_escaped(port, (uint8_t *)&crc, CRC);
    port->out[port->out_len++] = END;
}

static void send_u32(struct port *port, uint8_t type, uint32_t job, uint32_t value)
{
    send_frame(port, type, port->session, job, &value, 4);
}

/* ---- jobs ---------------------------------------------------------------------------------------------------- */

static struct job *find_job(const struct port *port, uint32_t id)
{
    for (struct job *job = jobs; job; job = job->next)
        if (job->port == port && job->id == id)
            return job;
    return NULL;
}

static void shut_input(struct job *job)
{
    shut(&job->input);
    free(job->pending);
    job->pending = NULL;
    job->pending_len = job->pending_pos = 0;
}

/* Nobody asks for the job any more. What is left of it is reaped, and its output thrown away. */
static void forget_job(struct job *job)
{
    if (job->port)
        job->port->jobs--;
    job->port = NULL;
    shut_input(job);
}

static void kill_jobs(struct port *port)
{
    for (struct job *job = jobs; job; job = job->next) {
        if (job->port != port)
            continue;
        if (job->pid)
            kill(-job->pid, SIGKILL);
        forget_job(job);
    }
}

/* What the child says about a failure to become the command; it shares our memory until then (vfork). */
struct launch {
    const char *cwd;
    char **argv, **envp; /* argv[-1] is free, for the shell that runs a script with no #! line */
    int in, out, err;
    bool cwd_failed;
    int error;
};

static void exec_file(const struct launch *launch, const char *path)
{
    execve(path, launch->argv, launch->envp);
    if (errno == ENOEXEC) {
        char *first = launch->argv[0];
        launch->argv[0] = (char *)path;
        launch->argv[-1] = "sh";
        execve("/bin/sh", launch->argv - 1, launch->envp);
        launch->argv[0] = first;
    }
}

static const char *find_env(char **envp, const char *name)
{
    size_t n = strlen(name);
    for (; *envp; envp++)
        if (!strncmp(*envp, name, n) && (*envp)[n] == '=')
            return *envp + n + 1;
    return NULL;
}

/* As execvp, but by the PATH that the command is given; returns with errno where that failed. */
static void exec_search(const struct launch *launch)
{
    const char *name = launch->argv[0], *dir = find_env(launch->envp, "PATH"), *end;
    char path[PATH_MAX];
    bool denied = false;
    if (strchr(name, '/')) {
        exec_file(launch, name);
        return;
    }
    errno = ENOENT;
    for (dir = dir ? dir : DEFAULT_PATH; *name; dir = end + 1) {
        end = strchrnul(dir, ':');
        if (snprintf(path, sizeof path, "%.*s%s%s", (int)(end - dir), dir, end > dir ? "/" : "", name) < PATH_MAX)
            exec_file(launch, path);
        /* As shells do, a directory that may not be searched counts as one that does not have it. */
        if (errno == EACCES)
            denied |= access(path, F_OK) == 0;
        else if (errno != ENOENT && errno != ENOTDIR)
            return;
        if (!*end)
            break;
    }
    errno = denied ? EACCES : ENOENT;
}

static __attribute__((noinline)) pid_t spawn(struct launch *launch)
{
    sigset_t none;
    pid_t pid;
    sigemptyset(&none);
    pid = vfork();
    if (pid)
        return pid;
    setsid();
    dup2(launch->in, 0);
    dup2(launch->out, 1);
    dup2(launch->err, 2);
    sigprocmask(SIG_SETMASK, &none, NULL);
    launch->cwd_failed = launch->cwd[0] && chdir(launch->cwd) < 0;
    if (!launch->cwd_failed)
        exec_search(launch);
    launch->error = errno;
    _exit(127);
}

/* The job never began: say why as a shell would, and end it. */
static void refuse(struct port *port, uint32_t id, int code, const char *what, const char *why)
{
    char text[512];
    int n = snprintf(text, sizeof text, "labkit: %.400s: %s\n", what, why);
    send_frame(port, STDERR, port->session, id, text, n < (int)sizeof text ? (size_t)n : sizeof text - 1);
    send_u32(port, EXIT, id, (uint32_t)code << 8);
}

static void watch_stream(struct stream *stream, int fd)
{
    stream->fd = fd;
    stream->watch = (struct watch){WATCH_STREAM, stream};
    fcntl(fd, F_SETFL, O_NONBLOCK);
    watch(fd, EPOLLIN | EPOLLET, &stream->watch);
}

static int open_pipes(int pipes[3][2], bool input)
{
    for (int i = 0; i < 3; i++)
        pipes[i][0] = pipes[i][1] = -1;
    for (int i = input ? 0 : 1; i < 3; i++)
        if (pipe2(pipes[i], O_CLOEXEC) < 0)
            return -1;
    return 0;
}

static void start_job(struct port *port, uint32_t id, struct launch *launch, bool input)
{
    int pipes[3][2], failed = open_pipes(pipes, input);
    struct job *job = failed ? NULL : calloc(1, sizeof *job);
    if (job && input)
        job->pending = malloc(STDIN_WINDOW);
    if (!job || (input && !job->pending) || port->jobs >= JOBS_MAX) {
        refuse(port, id, 126, launch->argv[0], failed ? strerror(errno) : "too many commands at once");
        goto undo;
    }
    launch->in = input ? pipes[0][0] : null_fd;
    launch->out = pipes[1][1];
    launch->err = pipes[2][1];
    job->pid = spawn(launch);
    if (job->pid < 0 || launch->error) { /* the child that failed is reaped as a stranger */
        int error = job->pid < 0 ? errno : launch->error;
        if (launch->cwd_failed)
            refuse(port, id, 126, launch->cwd, error == ENOENT ? "no such directory to run in" : strerror(error));
        else
            refuse(port, id, error == ENOENT ? 127 : 126, launch->argv[0],
                   error == ENOENT ? "not found" : strerror(error));
        goto undo;
    }
    job->id = id;
    job->port = port;
    port->jobs++;
    watch_stream(&job->streams[0], pipes[1][0]);
    watch_stream(&job->streams[1], pipes[2][0]);
    job->input = pipes[0][1];
    if (input) {
        job->input_watch = (struct watch){WATCH_INPUT, job};
        fcntl(job->input, F_SETFL, O_NONBLOCK);
        watch(job->input, EPOLLOUT | EPOLLET, &job->input_watch);
    }
    pipes[0][1] = pipes[1][0] = pipes[2][0] = -1;
    job->next = jobs;
    jobs = job;
    job = NULL;
undo:
    for (int i = 0; i < 3; i++)
        shut(&pipes[i][0]), shut(&pipes[i][1]);
    if (job)
        free(job->pending);
    free(job);
}

/* The agent's own environment with `count` pairs put over it; the texts stay where they are. */
static char **merge_env(char **pairs, uint32_t count)
{
    size_t own = 0, n = 0;
    char **merged;
    while (environ[own])
        own++;
    merged = malloc((own + count + 1) * sizeof *merged);
    if (!merged)
        return NULL;
    for (size_t i = 0; i < own; i++) {
        size_t name = strcspn(environ[i], "=") + 1;
        bool replaced = false;
        for (uint32_t k = 0; k < count && !replaced; k++)
            replaced = !strncmp(environ[i], pairs[k], name);
        if (!replaced)
            merged[n++] = environ[i];
    }
    for (uint32_t k = 0; k < count; k++)
        merged[n++] = pairs[k];
    merged[n] = NULL;
    return merged;
}

/* EXEC: take the payload apart where it lies. One that is malformed is dropped. */
static void exec_job(struct port *port, uint32_t id, uint8_t *p, size_t n)
{
    struct launch launch = {0};
    uint32_t argc, envc, count = 0;
    char **texts, *text;
    bool input;
    if (n < 10 || p[n - 1] || find_job(port, id))
        return;
    input = p[0] & 1;
    argc = get32(p + 1);
    envc = get32(p + 5);
    if (argc < 1 || argc > n || envc > n)
        return;
    texts = malloc((2 + argc + 1 + envc) * sizeof *texts); /* cwd, free, arguments, NULL, pairs */
    if (!texts)
        return;
    for (text = (char *)p + 9; text < (char *)p + n && count < 1 + argc + envc; text += strlen(text) + 1, count++)
        texts[count == 0 ? 0 : count <= argc ? count + 1 : count + 2] = text;
    if (count == 1 + argc + envc && text == (char *)p + n) {
        launch.cwd = texts[0];
        launch.argv = texts + 2;
        launch.argv[argc] = NULL;
        launch.envp = merge_env(texts + 2 + argc + 1, envc);
        if (launch.envp)
            start_job(port, id, &launch, input);
        free(launch.envp);
    }
    free(texts);
}

/* Give the child what it takes, and the host credit for that. */
static void feed_job(struct job *job)
{
    while (job->input >= 0 && job->input_ready && job->pending_len) {
        ssize_t n = write(job->input, job->pending + job->pending_pos, job->pending_len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            job->input_ready = false;
        } else if (n < 0) {
            /* It closed its standard input. No credit is given any more, so the host stops sending. */
            shut_input(job);
            return;
        } else {
            job->taken += n;
            job->pending_pos += n;
            job->pending_len -= n;
        }
    }
    if (job->input < 0)
        return;
    if (!job->pending_len)
        job->pending_pos = 0;
    if (job->taken && (job->taken >= CREDIT_STEP || !job->pending_len) && has_room(job->port, CONTROL_ROOM)) {
        send_u32(job->port, CREDIT, job->id, job->taken);
        job->taken = 0;
    }
    if (job->input_eof && !job->pending_len)
        shut_input(job);
}

static void take_input(struct job *job, const uint8_t *p, size_t n)
{
    if (job->input < 0 || job->input_eof)
        return;
    if (n > STDIN_WINDOW - job->pending_len) { /* more than it was granted: no client of ours */
        shut_input(job);
        return;
    }
    if (job->pending_pos + job->pending_len + n > STDIN_WINDOW) {
        memmove(job->pending, job->pending + job->pending_pos, job->pending_len);
        job->pending_pos = 0;
    }
    memcpy(job->pending + job->pending_pos + job->pending_len, p, n);
    job->pending_len += n;
    feed_job(job);
}

/* Pass on one piece of a job's output; true where more may be had at once. */
static bool pass_on(struct job *job, int which)
{
    static uint8_t data[DATA_MAX];
    struct stream *stream = &job->streams[which];
    ssize_t n;
    if (stream->fd < 0 || !stream->readable || (job->port && !has_room(job->port, DATA_ROOM + CONTROL_ROOM)))
        return false;
    n = read(stream->fd, data, sizeof data);
    if (n < 0 && errno == EAGAIN) {
        stream->readable = false;
        return false;
    }
    if (n < 0 && errno == EINTR)
        return true;
    if (n <= 0) {
        shut(&stream->fd);
        stream->owed = 0;
        return false;
    }
    job->heard = job->ended ? now_ms() : 0;
    stream->owed -= (size_t)n < stream->owed ? (size_t)n : stream->owed;
    if (job->port)
        send_frame(job->port, which ? STDERR : STDOUT, job->port->session, job->id, data, n);
    return true;
}

static size_t unread(const struct stream *stream)
{
    int n = 0;
    if (stream->fd >= 0)
        ioctl(stream->fd, FIONREAD, &n);
    return n;
}

static bool closed(const struct job *job)
{
    return job->streams[0].fd < 0 && job->streams[1].fd < 0;
}

/* When to look again whether a job has ended: ms, or 0 where only an event can change it. */
static int64_t end_due(const struct job *job)
{
    int64_t quiet = job->heard + QUIET_MS, chatter = job->ended + CHATTER_MS;
    if (!job->port || !job->ended || closed(job) || !has_room(job->port, DATA_ROOM + CONTROL_ROOM))
        return 0;
    return quiet < chatter ? quiet : chatter;
}

static bool has_ended(const struct job *job)
{
    int64_t now;
    if (job->pid)
        return false;
    if (closed(job))
        return true;
    now = now_ms();
    if (job->streams[0].owed || job->streams[1].owed)
        return false;
    if (now >= job->ended + CHATTER_MS)
        return true;
    return now >= job->heard + QUIET_MS && !unread(&job->streams[0]) && !unread(&job->streams[1]);
}

/* Move a job on; true where it could do more at once. */
static bool pump_job(struct job *job)
{
    bool more = false;
    if (job->port)
        feed_job(job);
    for (int which = 0; which < 2; which++)
        more |= pass_on(job, which);
    if (job->port && has_room(job->port, CONTROL_ROOM) && has_ended(job)) {
        send_u32(job->port, EXIT, job->id, job->status);
        forget_job(job);
    }
    return more;
}

static void reap(void)
{
    struct signalfd_siginfo info[8];
    int status;
    pid_t pid;
    while (read(signal_fd, info, sizeof info) > 0)
        ;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (struct job *job = jobs; job; job = job->next)
            if (job->pid == pid) {
                job->pid = 0;
                job->status = status;
                job->ended = job->heard = now_ms();
                for (int which = 0; which < 2; which++)
                    job->streams[which].owed = unread(&job->streams[which]);
                break;
            }
}

/* Free the jobs that are over. Of those whose background still holds their pipes, the oldest are cut off. */
static void sweep_jobs(void)
{
    unsigned drains = 0;
    for (struct job **at = &jobs; *at;) {
        struct job *job = *at;
        bool idle = !job->port && !job->pid;
        if (idle && !closed(job) && ++drains > DRAINS_MAX)
            shut(&job->streams[0].fd), shut(&job->streams[1].fd);
        if (idle && closed(job)) {
            *at = job->next;
            shut_input(job);
            free(job);
        } else {
            at = &job->next;
        }
    }
}

/* ---- ports --------------------------------------------------------------------------------------------------- */

static void greet(struct port *port, const uint8_t *nonce)
{
    static char boot_id[37];
    struct __attribute__((packed)) {
        uint8_t nonce[16];
        uint16_t version;
        uint32_t pid;
        uint64_t realtime, monotonic;
        char boot_id[36];
    } ack;
    if (!boot_id[0]) {
        int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
        if (fd < 0 || read(fd, boot_id, 36) != 36)
            memset(boot_id, '0', 36);
        shut(&fd);
    }
    kill_jobs(port);
    port->out_pos = port->out_len = 0;
    port->greeted = true;
    port->session = get32(nonce);
    port->sent = 0;
    port->expected = 1;
    memcpy(ack.nonce, nonce, 16);
    ack.version = VERSION;
    ack.pid = getpid();
    ack.realtime = clock_ns(CLOCK_REALTIME);
    ack.monotonic = clock_ns(CLOCK_MONOTONIC);
    memcpy(ack.boot_id, boot_id, 36);
    send_frame(port, HELLO_ACK, port->session, 0, &ack, sizeof ack);
}

/* Writing alone stirs the pool but is not taken up at once; forks of one guest must differ from here on. */
static int reseed(const uint8_t *p, size_t n)
{
    struct { struct rand_pool_info info; uint8_t data[512]; } pool;
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC), error = 0;
    if (fd < 0)
        return errno;
    n = n < sizeof pool.data ? n : sizeof pool.data;
    pool.info.entropy_count = n * 8;
    pool.info.buf_size = n;
    memcpy(pool.data, p, n);
    if (write(fd, p, n) < 0 || ioctl(fd, RNDADDENTROPY, &pool) < 0)
        error = errno;
    else
        ioctl(fd, RNDRESEEDCRNG); /* not before Linux 4.17 */
    close(fd);
    return error;
}

static int set_time(const uint8_t *p, size_t n)
{
    struct timespec t;
    uint64_t ns;
    if (n != 8)
        return EINVAL;
    memcpy(&ns, p, 8);
    t.tv_sec = ns / 1000000000;
    t.tv_nsec = ns % 1000000000;
    return clock_settime(CLOCK_REALTIME, &t) < 0 ? errno : 0;
}

static void pong(struct port *port, uint32_t id, const uint8_t *p, size_t n)
{
    uint8_t answer[65];
    if (n >= sizeof answer)
        return;
    answer[0] = find_job(port, id) != NULL;
    memcpy(answer + 1, p, n);
    send_frame(port, PONG, port->session, id, answer, n + 1);
}

static void handle(struct port *port, uint8_t type, uint32_t id, uint8_t *p, size_t n)
{
    struct job *job = find_job(port, id);
    switch (type) {
    case EXEC:
        exec_job(port, id, p, n);
        break;
    case STDIN:
        if (job)
            take_input(job, p, n);
        break;
    case STDIN_EOF:
        if (job) {
            job->input_eof = true;
            feed_job(job);
        }
        break;
    case SIGNAL:
        if (job && job->pid && n == 4)
            kill(-job->pid, get32(p));
        break;
    case PING:
        pong(port, id, p, n);
        break;
    case RESEED:
        send_u32(port, DONE, id, reseed(p, n));
        break;
    case SETTIME:
        send_u32(port, DONE, id, set_time(p, n));
        break;
    }
}

/* A whole frame is in: check it and act on it. */
static void take_frame(struct port *port)
{
    uint8_t *frame = port->frame;
    size_t n = port->frame_len - CRC;
    uint32_t session, id;
    if (port->frame_len < HEADER + CRC || ~crc_update(~0u, frame, n) != get32(frame + n))
        return;
    session = get32(frame + 1);
    id = get32(frame + 9);
    if (frame[0] == HELLO) {
        if (n == HEADER + 16)
            greet(port, frame + HEADER);
    } else if (!port->greeted || session != port->session || get32(frame + 5) != port->expected) {
        send_frame(port, STALE, session, id, frame, 1);
    } else {
        port->expected++;
        handle(port, frame[0], id, frame + HEADER, n - HEADER);
    }
}

/* Take the next piece of what was read: a run of plain bytes, or one that means something. */
static void take_piece(struct port *port)
{
    const uint8_t *p = port->in + port->in_pos;
    size_t run = 1;
    if (*p == END) {
        if (!port->spoilt && !port->escaped)
            take_frame(port);
        port->frame_len = 0;
        port->spoilt = port->escaped = false;
    } else if (port->escaped) {
        port->escaped = false;
        if ((*p != ESC_END && *p != ESC_ESC) || port->frame_len == FRAME_MAX)
            port->spoilt = true;
        else
            port->frame[port->frame_len++] = *p == ESC_END ? END : ESC;
    } else if (*p == ESC) {
        port->escaped = true;
    } else {
        run = plain(p, port->in_len - port->in_pos);
        if (run > FRAME_MAX - port->frame_len)
            port->spoilt = true;
        else if (!port->spoilt) {
            memcpy(port->frame + port->frame_len, p, run);
            port->frame_len += run;
        }
    }
    port->in_pos += run;
}

static void drop_port(struct port *port)
{
    kill_jobs(port);
    shut(&port->fd);
    rescan_at = port->fixed ? 0 : now_ms() + RESCAN_MS;
}

static void flush_port(struct port *port)
{
    while (port->fd >= 0 && port->writable && port->out_pos < port->out_len) {
        ssize_t n = write(port->fd, port->out + port->out_pos, port->out_len - port->out_pos);
        if (n >= 0)
            port->out_pos += n;
        else if (errno == EAGAIN)
            port->writable = false;
        else if (errno != EINTR)
            drop_port(port);
    }
    if (port->out_pos == port->out_len)
        port->out_pos = port->out_len = 0;
}

static void read_port(struct port *port)
{
    ssize_t n = read(port->fd, port->in, IN_SIZE);
    if (n > 0) {
        port->in_pos = 0;
        port->in_len = n;
        port->away_since = 0;
    } else if (n == 0 && !port->fixed) {
        /* No host. It may be back already, with its news still on the way; so its jobs live on for a while. */
        port->readable = false;
        port->away_since = now_ms();
    } else if (n < 0 && errno == EAGAIN) {
        port->readable = false;
    } else if (n == 0 || errno != EINTR) {
        drop_port(port);
    }
}

/* Act on what the host sent, while its answers find room; true where there may be more at once. */
static bool pump_input(struct port *port)
{
    if (port->fd >= 0 && port->in_pos == port->in_len && port->readable)
        read_port(port);
    while (port->fd >= 0 && port->in_pos < port->in_len && has_room(port, CONTROL_ROOM))
        take_piece(port);
    return port->fd >= 0 && has_room(port, CONTROL_ROOM) && (port->readable || port->in_pos < port->in_len);
}

/* The host has been away for long: the jobs that it left are killed, as by the next HELLO. */
static void check_away(struct port *port)
{
    struct pollfd state = {.fd = port->fd};
    if (!port->away_since || now_ms() < port->away_since + AWAY_MS)
        return;
    port->away_since = 0;
    if (port->greeted && poll(&state, 1, 0) == 1 && state.revents & POLLHUP) {
        kill_jobs(port);
        port->greeted = false;
        port->out_pos = port->out_len = 0;
    }
}

static void add_port(int fd, const char *device)
{
    struct port *port = calloc(1, sizeof *port);
    if (port)
        port->frame = malloc(FRAME_MAX);
    if (!port || !port->frame)
        die("memory");
    port->fd = fd;
    port->fixed = !device[0];
    snprintf(port->device, sizeof port->device, "%s", device);
    port->watch = (struct watch){WATCH_PORT, port};
    port->next = ports;
    ports = port;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    /* Edge-triggered, since a virtio port is at POLLHUP all the while that its host is away. */
    watch(fd, EPOLLIN | EPOLLOUT | EPOLLET, &port->watch);
}

static void sweep_ports(void)
{
    for (struct port **at = &ports; *at;) {
        struct port *port = *at;
        if (port->fd < 0) {
            *at = port->next;
            free(port->frame);
            free(port);
        } else {
            at = &port->next;
        }
    }
}

/* Whether sysfs says that the port has a name of ours. */
static bool is_ours(const char *device)
{
    char path[300], name[sizeof PORT_NAME];
    int fd;
    ssize_t n;
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", device);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    n = read(fd, name, sizeof name);
    close(fd);
    return n >= (ssize_t)sizeof name && !memcmp(name, PORT_NAME, sizeof name - 1);
}

static bool is_open(const char *device)
{
    for (struct port *port = ports; port; port = port->next)
        if (port->fd >= 0 && !strcmp(port->device, device))
            return true;
    return false;
}

static void scan_ports(void)
{
    DIR *dir = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    rescan_at = 0;
    while (dir && (entry = readdir(dir))) {
        char path[sizeof "/dev/" + sizeof entry->d_name];
        int fd;
        if (strlen(entry->d_name) >= sizeof ports->device || is_open(entry->d_name) || !is_ours(entry->d_name))
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        if (fd >= 0)
            add_port(fd, entry->d_name);
        else /* its node is not made yet, or an agent before us has not let go of it */
            rescan_at = now_ms() + RESCAN_MS;
    }
    if (dir)
        closedir(dir);
}

/* Read what the kernel says about devices; true where it was about a virtio port, or was lost. */
static bool heard_of_ports(void)
{
    char message[8192];
    bool heard = false;
    for (;;) {
        ssize_t n = recv(uevent_fd, message, sizeof message, 0);
        if (n < 0 && errno == ENOBUFS)
            heard = true;
        else if (n < 0 && errno != EINTR)
            return heard;
        else if (n > 0)
            heard |= memmem(message, n, "SUBSYSTEM=virtio-ports", 22) != NULL;
    }
}

/* ---- the loop ------------------------------------------------------------------------------------------------ */

static bool pump(void)
{
    bool more = false;
    for (struct port *port = ports; port; port = port->next) {
        check_away(port);
        more |= pump_input(port);
    }
    for (struct job *job = jobs; job; job = job->next)
        more |= pump_job(job);
    for (struct port *port = ports; port; port = port->next) {
        bool was_full = !has_room(port, DATA_ROOM + CONTROL_ROOM);
        flush_port(port);
        more |= was_full && has_room(port, DATA_ROOM + CONTROL_ROOM);
    }
    sweep_jobs();
    sweep_ports();
    return more;
}

/* ms until something falls due, -1 for never: as epoll_wait takes it. */
static int next_due(void)
{
    int64_t due = rescan_at ? rescan_at : INT64_MAX, left;
    for (struct job *job = jobs; job; job = job->next)
        if (end_due(job) && end_due(job) < due)
            due = end_due(job);
    for (struct port *port = ports; port; port = port->next)
        if (port->away_since && port->away_since + AWAY_MS < due)
            due = port->away_since + AWAY_MS;
    if (due == INT64_MAX)
        return -1;
    left = due - now_ms();
    return left < 0 ? 0 : left > 60000 ? 60000 : (int)left;
}

static void note(const struct epoll_event *event)
{
    const struct watch *watch = event->data.ptr;
    struct port *port;
    switch (watch->kind) {
    case WATCH_CHILDREN:
        reap();
        break;
    case WATCH_UEVENTS:
        if (heard_of_ports())
            scan_ports();
        break;
    case WATCH_PORT:
        port = watch->owner;
        port->readable |= (event->events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0;
        port->writable |= (event->events & (EPOLLOUT | EPOLLERR)) != 0;
        break;
    case WATCH_STREAM:
        ((struct stream *)watch->owner)->readable = true;
        break;
    case WATCH_INPUT:
        ((struct job *)watch->owner)->input_ready = true;
        break;
    }
}

static void serve(void)
{
    struct epoll_event events[32];
    bool fixed = uevent_fd < 0, more = false;
    while (!fixed || ports) {
        int n = epoll_wait(epoll_fd, events, 32, more ? 0 : next_due());
        for (int i = 0; i < n; i++)
            note(&events[i]);
        if (rescan_at && now_ms() >= rescan_at)
            scan_ports();
        more = pump();
    }
}

static void set_up(void)
{
    static struct watch children = {WATCH_CHILDREN, NULL};
    sigset_t blocked;
    do /* descriptors 0 to 2 are what a child gets, so no other may have them */
        null_fd = open("/dev/null", O_RDWR);
    while (null_fd >= 0 && null_fd < 3);
    if (null_fd < 0)
        die("/dev/null");
    fcntl(null_fd, F_SETFD, FD_CLOEXEC);
    /* Children inherit what is ignored and what is blocked; so ignore nothing, and let them unblock. */
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    sigaddset(&blocked, SIGPIPE);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
    sigdelset(&blocked, SIGPIPE);
    signal_fd = signalfd(-1, &blocked, SFD_NONBLOCK | SFD_CLOEXEC);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (signal_fd < 0 || epoll_fd < 0)
        die("signalfd or epoll");
    watch(signal_fd, EPOLLIN, &children);
    umask(022);
    setenv("PATH", DEFAULT_PATH, 0);
    setenv("HOME", "/root", 0);
    crc_init();
}

static void listen_for_ports(void)
{
    static struct watch uevents = {WATCH_UEVENTS, NULL};
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    uevent_fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (uevent_fd < 0 || bind(uevent_fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("netlink");
    watch(uevent_fd, EPOLLIN, &uevents);
    scan_ports();
}

int main(int argc, char **argv)
{
    set_up();
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc || strcmp(argv[i], "--fd")) {
            fprintf(stderr, "usage: labkit-agent [--fd N]...\n");
            return 2;
        }
        add_port(atoi(argv[i + 1]), "");
    }
    if (argc == 1)
        listen_for_ports();
    serve();
    return 0;
}
