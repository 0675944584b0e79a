//! flexnbd serves a disk image or block device over NBD.
//!
//! # The map
//!
//! Modules are floors: a module uses those below it, never one beside or above it. `tests/house.rs`
//! keeps it so.
//!
//! ```text
//! 6   main  generator                   programs; they never use each other
//! 5   cli
//! 4   daemon
//! 3   server  migration
//! 2   client  control
//! 1   nbd  disk  net  systemd
//! 0   human  memory_reserve  message_id  milestones  range  small_file  sync  transition_table
//! ```
//!
//! * [`human`]: counts, sizes, times and percentages in texts for operators.
//! * [`memory_reserve`]: the global allocator, with a reserve for small allocations.
//! * [`message_id`]: the message ids of the journal.
//! * [`milestones`]: which points of a copy's progress get a line.
//! * [`range`]: a byte range that can neither overflow nor leave its disk.
//! * [`small_file`]: reads regular files of bounded size.
//! * [`sync`]: locks and waits that ignore poisoning.
//! * `transition_table`: compares decisions with their table in the source tree; in tests only.
//! * [`nbd`]: the NBD protocol, both roles: bytes in, values out; pure.
//! * [`disk`]: the image, its gate, its I/O, its ownership record.
//! * [`net`]: sockets, with the options and waits that NBD needs.
//! * [`systemd`]: inherited sockets, notifications, the journal, the file descriptor store.
//! * [`client`]: one connection to another server's export.
//! * [`control`]: the control socket: commands of operators, and their replies.
//! * [`server`]: sessions of clients.
//! * [`migration`]: moves the disk to another server; both sides.
//! * [`daemon`]: one process: opens the modules, handles their events, closes them in order.
//! * [`cli`]: one struct per command.
//!
//! `main.rs` is the program. `generator.rs` is another, which systemd runs at boot: it turns
//! configurations into drop-ins for the units in `systemd/`.
//!
//! `client` stands below both the command line and a migration, because both speak to other servers, in
//! one way. A peer is called by trait where it stands above: `ServerEvents`, `ExportPolicy`, `Notifier`.
//!
//! # A request
//!
//! ```text
//! systemd/sockets ─▶ daemon ─▶ server ─▶ session ─▶ nbd ─▶ disk ─▶ nbd ─▶ the client
//!   (once)           (once)    accept,   receives   parse  gate,   encode
//!                              acl       a batch           bytes
//! ```
//!
//! Decisions are pure: values in, values out,
//! with time, randomness and I/O as arguments.
//! Disk I/O that may block, or must be durable, is in flight (`disk/inflight`): an operation becomes calls
//! (`disk/io_queue`) to io_uring (`disk/uring`) or a thread (`disk/thread_pool`), the session goes on with
//! the next request, and the completion is answered out of order. Of two overlapping changes the earlier is executed first,
//! whichever sessions they belong to (`disk/overlap`).
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
//! | `mirror` | one outgoing migration (`migration/source`) | the destination, the disk, its deadlines |
//! | `pulse`, `pulse-disk` | the watchdog, and the read that it uses as a probe of the disk | time; the disk |
//! | `reload`, `asking` | one reload; one question to another host | their answers |
//!
//! Threads that a peer causes start only where memory is left ([`memory_reserve`]).
//!
//! # Lock order
//!
//! From first to last; a thread that holds one of them takes only later ones.
//!
//! 1. `OutgoingMigrations::starting`: held while a migration starts; never waited for, since a second
//!    order is refused.
//! 2. `Service::server`: held during calls to the server.
//! 3. `Destination::settling`: held while data and record are made durable. Never waited for by a thread
//!    with I/O in flight, because the flush waits for all I/O.
//! 4. `Destination::arrival`: the state of an incoming disk.
//! 5. `ActiveCommands::closed`: held while an idle process stops accepting commands and clients.
//! 6. The table in `server/sessions`. Under it `ServerEvents` are reported: their handlers only send.
//! 7. Leaves, under which no other lock is taken and nothing is waited for but their own condition
//!    variables: all others, such as overlap, flush errors, record store and queues.
//!
//! The gate is not a lock, but is waited for like one. It is entered with none of them held but
//! `settling`, since nothing closes the gate of a disk that arrives. Closing waits for all visits, so
//! that a visit never waits for a peer.
//!
//! # Glossary
//!
//! Words of our own. All others are those of the NBD specification, of the
//! kernel's block layer and of QEMU's.
//!
//! * **disk**: the exported bytes, whatever keeps them. **image**: the file or block device that does.
//! * **gate**: the barrier that all disk access of sessions passes. Closing it drains what is inside.
//! * **visit**: the guard of one passage through the gate; disk access happens through it.
//! * **copier**: the view that reads without passing the gate: for a migration, which is the one that
//!   closes it, and for the watchdog's probe.
//! * **record**: the ownership record beside an image: *incoming* (half a copy), *ours*, *departing*
//!   (a handover was begun), *departed* (another host owns the disk now).
//! * **handover**: the request by which a source gives the disk away. **in doubt**: it was sent and its
//!   outcome is unknown; neither side serves until that is resolved.
//! * **provenance**: how a disk became ours: native; arrived, from a source that introduced itself;
//!   received, from a sender that could not; or adopted, by an operator's command.

pub mod cli;
pub mod client;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod human;
pub mod memory_reserve;
pub mod message_id;
pub mod migration;
pub mod milestones;
pub mod nbd;
pub mod net;
pub mod range;
pub mod server;
pub mod small_file;
pub mod sync;
pub mod systemd;
#[cfg(test)]
mod transition_table;
