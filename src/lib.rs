//! flexnbd serves a disk image or block device over NBD.
//!
//! # The house
//!
//! Rooms are modules; floors say who may lean on whom. `tests/house.rs` keeps it so.
//!
//! ```text
//! 7   main  generator                   may use everything below; programs, so never each other
//! 6   cli                               may use everything below
//! 5   daemon                            may use everything below
//! 4   control                           may use server and client through what daemon hands it
//! 3   server  migration                 may use floors 0 to 2; never each other
//! 2   client                            may use floors 0 and 1
//! 1   nbd  disk  net  systemd           may use floor 0; never each other
//! 0   memory_reserve  range  small_file  words
//! ```
//!
//! * [`memory_reserve`]: the global allocator, with a reserve for small allocations.
//! * [`range`]: a span of the disk that can neither overflow nor leave the disk.
//! * [`small_file`]: regular files of bounded size, read whole.
//! * [`words`]: numbers and times in sentences for people.
//! * [`nbd`]: the language. Bytes in, values out; pure.
//! * [`disk`]: the bytes being served, and who may touch them now.
//! * [`net`]: sockets as NBD wants them.
//! * [`systemd`]: what the service manager gives and wants to hear.
//! * [`client`]: one connection to somebody else's export.
//! * [`server`]: serving clients.
//! * [`migration`]: moving the disk to another server.
//! * [`control`]: orders from operators.
//! * [`daemon`]: one process: opens the rooms, waits for events, closes them in order.
//! * [`cli`]: one struct per command.
//!
//! `main.rs` is the program. `generator.rs` is another, which systemd runs at boot: it turns
//! configurations into drop-ins for the units in `systemd/`.
//!
//! `client` has a floor of its own because the command line, a migration and a proxy all speak
//! to other servers, and must do it with one voice.
//!
//! # The life of a request
//!
//! ```text
//! systemd/sockets ─▶ daemon ─▶ server ─▶ session ─▶ nbd ─▶ disk ─▶ nbd ─▶ the client
//!   (once)           (once)    accept,   reads      parse  gate,   encode
//!                              acl       a batch           bytes
//! ```
//!
//! Each room is entered once and nothing goes back up. What decides is pure; what does is thin.
//! What the disk takes long for is an errand (`disk/errands`): it leaves here with its visit, is made
//! by the kernel (`disk/ring`) or a thread (`disk/helpers`) meanwhile, and comes back to be answered.
//! The session goes on with the next request. Of two changes of the same bytes the earlier is made
//! first, whichever sessions they belong to (`disk/inflight`).
//! Trouble that belongs to a peer ends the peer; trouble that belongs to us goes up to `main`.
//!
//! # A restart
//!
//! ```text
//! session ─▶ server/carry ─▶ daemon ─▶ systemd/store ═▶ the service manager
//!  packs up   in one piece    passes it on               keeps it for the next process,
//!                                                        where it goes the same way back
//! ```

pub mod cli;
pub mod client;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod memory_reserve;
pub mod migration;
pub mod nbd;
pub mod net;
pub mod range;
pub mod server;
pub mod small_file;
pub mod systemd;
pub mod words;
