//! The kernel's NBD client and the file systems on it, in virtual machines with Debian's kernel; power
//! cuts below the file systems of images; and the installed package on a Debian with systemd and udev.
//! Never touches the machine that runs the tests, whose kernel may lack the modules.
//!
//! Needs root, amd64 and the packages that `tests/run` installs. Measures nothing, since the
//! processor is emulated.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "vm/host.rs"]
mod host;
#[path = "vm/log_writes.rs"]
mod log_writes;
#[path = "vm/machine.rs"]
mod machine;
#[path = "vm/nbd_device.rs"]
mod nbd_device;
#[path = "vm/session.rs"]
mod session;

#[path = "vm/attach.rs"]
mod attach;
#[path = "vm/attach_proxy.rs"]
mod attach_proxy;
#[path = "vm/bad_disks.rs"]
mod bad_disks;
#[path = "vm/boot.rs"]
mod boot;
#[path = "vm/crash.rs"]
mod crash;
#[path = "vm/crash_load.rs"]
mod crash_load;
#[path = "vm/file_systems.rs"]
mod file_systems;
#[path = "vm/kernel_client.rs"]
mod kernel_client;
#[path = "vm/proxy.rs"]
mod proxy;
#[path = "vm/relay.rs"]
mod relay;
#[path = "vm/restart.rs"]
mod restart;
#[path = "vm/tls.rs"]
mod tls;
