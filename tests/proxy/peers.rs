//! Upstreams of other makes, which are killed and started again while clients write.

use harness::image::stamped_image;
use harness::writers::Writers;
use harness::{
    Builder, Endpoint, MIB, require_tool, temp_dir, unused_loopback_address, wait_until,
};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const SIZE: u64 = 64 * MIB;
const EXPORT: &str = "disk";
const KILLS: usize = 3;
const PAUSE: Duration = Duration::from_millis(5);

/// A server and its children, in a process group of their own.
struct Group(Pid);

impl Group {
    /// Starts a server, which may become a daemon that writes its process id to a file, and returns once
    /// it accepts connections.
    #[track_caller]
    fn start(mut command: Command, address: SocketAddr, pid_file: Option<&Path>) -> Group {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let group = match pid_file {
            None => Group(Pid::from_raw(command.spawn().unwrap().id().cast_signed())),
            Some(file) => {
                assert!(command.status().unwrap().success());
                let mut pid = None;
                wait_until("the daemon's process id", || {
                    pid = fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok());
                    pid.is_some()
                });
                fs::remove_file(file).unwrap();
                Group(Pid::from_raw(pid.unwrap()))
            }
        };
        wait_until("the server to listen", || TcpStream::connect(address).is_ok());
        group
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = killpg(self.0, Signal::SIGKILL);
        // A daemon is no child.
        let _ = waitpid(self.0, None);
    }
}

/// How to start a server: its program, and its arguments for an image at an address. One that becomes a
/// daemon gets a configuration file, and a file for its process id.
struct Kind {
    program: &'static str,
    arguments: fn(&Path, SocketAddr) -> String,
    configuration: Option<fn(&Path, SocketAddr) -> String>,
}

impl Kind {
    #[track_caller]
    fn start(&self, directory: &Path, image: &Path, address: SocketAddr) -> Group {
        let mut command = Command::new(self.program);
        command.args((self.arguments)(image, address).split_whitespace());
        let Some(configuration) = self.configuration else {
            return Group::start(command, address, None);
        };
        let (file, pid) = (directory.join("conf"), directory.join("pid"));
        fs::write(&file, configuration(image, address)).unwrap();
        command.arg("-C").arg(&file).arg("-p").arg(&pid);
        Group::start(command, address, Some(&pid))
    }

    /// Has clients write through a proxy while the server is killed several times.
    #[track_caller]
    fn kill_under_writers(&self) {
        if !require_tool(self.program) {
            return;
        }
        let (dir, address) = (temp_dir(), unused_loopback_address());
        let image = dir.path().join("disk");
        stamped_image(&image, SIZE);
        let mut server = self.start(dir.path(), &image, address);
        let uri = Endpoint::Tcp(address).uri_of(EXPORT);
        let proxy = Builder::proxy().args(["--quiet", "--to", &uri]).start();
        let writers = Writers::start(proxy.endpoint().clone(), SIZE, (4, 1, PAUSE));
        for _ in 0..KILLS {
            writers.wait_for_writes(100);
            drop(server);
            server = self.start(dir.path(), &image, address);
        }
        writers.wait_for_writes(100);
        let written = writers.stop();
        assert_eq!(written.connections, 4, "no writer has connected again");
        written.assert_all_present(&image, self.program);
    }
}

#[test]
fn clients_live_through_kills_of_nbdkit() {
    let arguments = |image: &Path, at: SocketAddr| {
        format!("-f -e {EXPORT} -i {} -p {} file {}", at.ip(), at.port(), image.display())
    };
    Kind { program: "nbdkit", arguments, configuration: None }.kill_under_writers();
}

#[test]
fn clients_live_through_kills_of_qemu_nbd() {
    let arguments = |image: &Path, at: SocketAddr| {
        let options = format!("-f raw -t -e 8 -x {EXPORT} --discard=unmap");
        format!("{options} -b {} -p {} {}", at.ip(), at.port(), image.display())
    };
    Kind { program: "qemu-nbd", arguments, configuration: None }.kill_under_writers();
}

#[test]
fn clients_live_through_kills_of_nbd_server() {
    let configuration = |image: &Path, at: SocketAddr| {
        let (ip, port, image) = (at.ip(), at.port(), image.display());
        let export = format!("[{EXPORT}]\nexportname={image}\nflush=true\nfua=true\n");
        format!("[generic]\nlistenaddr={ip}\nport={port}\n{export}")
    };
    let arguments = |_: &Path, _: SocketAddr| String::new();
    let configuration: Option<fn(&Path, SocketAddr) -> String> = Some(configuration);
    Kind { program: "nbd-server", arguments, configuration }.kill_under_writers();
}
