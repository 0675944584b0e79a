//! flexnbd serves a disk image or block device over NBD.
//!
//! # The map
//!
//! Modules are floors: a module uses those below it, never one beside or above it. `tests/house.rs`
//! enforces this.
//!
//! ```text
//! 6   main  generator                   programs; they never use each other
//! 5   cli
//! 4   daemon
//! 3   server  migration  upstream
//! 2   client  control
//! 1   nbd  disk  net  sandbox  systemd
//! 0   human  ids  memory_reserve  message_id  milestones  range  small_file  sync  schedules  transition_table
//! ```
//!
//! * [`human`]: counts, sizes, times and percentages in texts for operators.
//! * [`ids`]: ids of 128 random bits, such as that of a disk.
//! * [`memory_reserve`]: the global allocator, with a reserve for small allocations.
//! * [`message_id`]: the message ids of the journal.
//! * [`milestones`]: the points of a copy's progress that get a line.
//! * [`range`]: a byte range that can neither overflow nor leave its disk.
//! * [`small_file`]: reads regular files of bounded size.
//! * [`sync`]: locks and waits that ignore poisoning.
//! * `fuzz_tests`: the fuzz targets; only in tests and for the fuzzer.
//! * `schedules`: runs simulations from seeds; only in tests.
//! * `transition_table`: compares decisions with their table in the source tree; only in tests.
//! * [`nbd`]: the NBD protocol, both roles: bytes in, values out; pure.
//! * [`disk`]: the image, its gate, its I/O, its ownership record.
//! * [`net`]: sockets, with the options and waits that NBD needs.
//! * [`sandbox`]: restricts the process to the files and system calls that it needs.
//! * [`systemd`]: inherited sockets, notifications, the journal, the file descriptor store.
//! * [`client`]: one connection to another server's export.
//! * [`control`]: the control socket: commands of operators, and their replies.
//! * [`server`]: sessions of clients.
//! * [`migration`]: moves the disk to another server; both sides.
//! * [`upstream`]: another server's export as a backend of a disk, which may go away and come back.
//! * [`daemon`]: one process: opens the modules, handles their events, closes them in order.
//! * [`cli`]: the command line; one struct per command.
//!
//! `main.rs` is the program. `generator.rs` is a second program, which systemd runs at boot: it writes
//! drop-ins for the units in `systemd/` from the configurations.
//!
//! `client` is below both the command line and the migration, because both connect to other servers. A
//! module calls one that is not below it only through a trait: `ServerEvents`, `ExportPolicy`, `Notifier`,
//! `FlushObserver`.
//!
//! # A request
//!
//! ```text
//! systemd/sockets ─▶ daemon ─▶ server ─▶ driver ─▶ rx ─▶ engine ─▶ disk ─▶ engine ─▶ tx ─▶ driver
//!   (once)           (once)    accept,   receives       parses    gate,    encodes       sends
//!                              acl       a batch        (nbd)     bytes    (nbd)
//! ```
//!
//! The handshake of a session and its engine (`server/session`) are state machines without a socket: they do
//! all possible work, and return the reason to wait. The driver receives, sends and waits, and is the only
//! place of a session that does; only the replies of an upstream may also be received where completions are
//! taken (`upstream/queue`).
//!
//! Decisions are pure: values in, values out, with time, randomness and I/O as arguments.
//!
//! Disk I/O that may block, or must be durable, is an operation in flight (`disk/inflight`). The same `Op`
//! (`disk/op`) goes from the engine to io_uring (`disk/uring`) or a thread (`disk/thread_pool`) and back; a
//! read returns with its bytes, unless they are sent from the page cache. The session continues with the
//! next request meanwhile, and the reply is sent out of order, at the completion. Of two overlapping
//! changes the earlier one is executed first, whichever sessions they belong to (`disk/overlap`).
//!
//! A command of the protocol is in six files: `nbd/wire` (its number and flags), `nbd/request` (its
//! checks), `server/session/engine` (its operation), `disk/op` (that operation), `disk/file_backend` and
//! `disk/uring` (its execution); `upstream/machine` sends it on, where another server has the disk. One
//! that a backend may lack is also a feature (`disk/features`), which `server/shared` offers to clients.
//!
//! A peer's fault ends that peer's session; our own fault propagates to `main`.
//!
//! # A restart
//!
//! ```text
//! session ─▶ server/snapshot ─▶ daemon ─▶ systemd/fd_store ═▶ the service manager
//!   saves      encodes           passes     stores             keeps it for the next process,
//!                                                              which restores it the same way
//! ```
//!
//! # Threads
//!
//! | name | runs | waits for |
//! |---|---|---|
//! | `flexnbd` | the event loop (`daemon/event_loop`); starts and stops all others | its channel of events |
//! | `signals` | turns signals into events | signals |
//! | `log` | writes log lines (`systemd/log_queue`), so that a blocked log blocks no session | the queue of lines |
//! | `serve` | accepts clients and greets them (`server/accept`) | listening sockets, silent connections |
//! | `client-N` | session N (`server/session`) | its socket, its completions, the gate |
//! | `disk` | disk I/O where io_uring cannot be used, and write-back (`disk/thread_pool`) | work |
//! | `control`, `control-client` | the control socket, and each of its clients | the sockets |
//! | `upstream`, `upstream-N` | connects to another server's export, and receives from connection N (`upstream/link`) | its sockets, time |
//! | `mirror` | one outgoing migration (`migration/source`) | the destination, the disk, its deadlines |
//! | `pulse`, `pulse-disk` | the watchdog, and the read that it uses as a probe of the disk | time; the disk |
//! | `disk-id` | makes the id of a disk durable that has just got one (`daemon/disk_identity`) | the disk |
//! | `recording` | writes a failed flush to the record (`daemon/flush_failure`) | the disk |
//! | `reload`, `asking` | one reload; one question to another host | their answers |
//! | `attempting`, `resolving` | one attempt to connect to an upstream (`upstream/attempts`), and its search for the address of a host | the other server; the resolver |
//! | `connecting`, `flushing` | the first connection of a proxy, and its last flush (`daemon/proxying`) | the other server |
//!
//! Threads that a peer causes start only where memory is left ([`memory_reserve`]).
//!
//! # Lock order
//!
//! From first to last; a thread that holds one of them takes only later ones.
//!
//! 1. `OutgoingMigrations::starting`: held while a migration starts; never waited for, since a second
//!    command is refused.
//! 2. `Service::server`: held during calls to the server.
//! 3. `Destination::settling`: held while data and record are made durable. Never waited for by a thread
//!    with I/O in flight, because the flush waits for all I/O.
//! 4. `Destination::arrival`: the state of an incoming disk.
//! 5. `ActiveCommands::closed`: held while an idle process stops accepting commands and clients.
//! 6. The table in `server/sessions`. Under it `ServerEvents` are reported: their handlers only send.
//! 7. Leaves: all other locks, such as those of overlap, flush errors, record store and queues. A thread
//!    that holds one takes no other lock and waits only for the condition variable of that lock.
//!
//! `UpstreamLink::state` is a leaf, although a thread that holds it sends: its sockets do not block. It is
//! taken under `UpstreamConnection::rx`, which is a leaf otherwise.
//!
//! The gate is not a lock, but threads wait for it as for one. A thread that enters it holds none of
//! these locks except `settling`, since nothing closes the gate of an incoming disk. Closing the gate
//! waits for all visits; therefore a visit never waits for a peer. One to an upstream does,
//! so nothing closes the gate of a disk that is on another server.
//!
//! # Glossary
//!
//! Words of our own. All others are those of the NBD specification and of the block layers of the kernel
//! and QEMU.
//!
//! * **disk**: the exported bytes. **image**: the file or block device that stores them.
//! * **gate**: the barrier that all disk access of sessions passes. Closing it drains the visits inside.
//! * **visit**: the guard of one passage through the gate; disk access happens through it.
//! * **copier**: the view that reads without passing the gate: for the migration that closes the gate,
//!   and for the watchdog's probe.
//! * **record**: the ownership record beside an image: *incoming* (half a copy), *ours*, *departing*
//!   (a handover was begun), *departed* (another host owns the disk now).
//! * **handover**: the request by which a source gives the disk away. **in doubt**: it was sent and its
//!   outcome is unknown; neither side serves until that is resolved.
//! * **disk id**: 128 random bits that move with a disk; a proxy recognizes the disk by them.
//! * **upstream**: the server that has the disk of a proxy, or that a source relays to.
//! * **relay**: after a handover, pass the requests of clients that have stayed at the source on to the
//!   destination.
//! * **provenance**: how a disk became ours: native; arrived, from a source that introduced itself;
//!   received, from a sender that could not; or adopted, by an operator's command.

pub mod cli;
pub mod client;
pub mod control;
pub mod daemon;
pub mod disk;
#[cfg(any(test, fuzzing))]
pub mod fuzz_tests;
pub mod human;
pub mod ids;
pub mod memory_reserve;
pub mod message_id;
pub mod migration;
pub mod milestones;
pub mod nbd;
pub mod net;
pub mod range;
pub mod sandbox;
#[cfg(test)]
mod schedules;
pub mod server;
pub mod small_file;
pub mod sync;
pub mod systemd;
#[cfg(test)]
mod transition_table;
pub mod upstream;
