//! Turns each `/etc/flexnbd/NAME.conf` into drop-ins for the units of instance NAME, at boot and at
//! each daemon-reload: see systemd.generator(7).
//! Never looks at a disk, which may be on a file system that is not there yet; and a file that is
//! wrong breaks nobody else's units.
//!
//! | key | becomes |
//! |---|---|
//! | `ADDR` `PORT` | `ListenStream=` of `flexnbd@NAME.socket` |
//! | `FILE` | what `flexnbd@NAME.service` and `flexnbd-listen@NAME.service` may touch |
//! | `MAX_CLIENTS` | room for so many sessions in the service's fd store |
//! | `AUTOSTART` | the instance is wanted at boot, or its sockets are |
//! | `ACL` with `IP_FILTER` | `IPAddressAllow=` of the socket |
//!
//! # Why `ACL` alone is no `IPAddressAllow=`
//!
//! The list can be changed while a server runs, by `systemctl reload` and `flexnbd acl`, and holds
//! from then on: for a client that was not admitted before, too. A filter in the socket unit is
//! changed by a daemon-reload and by nothing else, so that it would go on keeping that client out.
//! It also drops packets silently, where the server closes the connection and logs whose it was. So
//! the filter is there for those who ask for it.

use flexnbd::cli::operate::Instance;
use flexnbd::cli::settings::{Autostart, Settings};
use flexnbd::cli::{config, instance};
use flexnbd::server::acl::Acl;
use flexnbd::small_file;
use flexnbd::systemd::unit::{device_unit, is_instance_name, quoted, unspecific, warn};
use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What we call ourselves in the log.
const PROGRAM: &str = "flexnbd-generator";
/// What the name of a configuration ends with.
const SUFFIX: &str = ".conf";

/// `StateDirectory=` of the services.
const STATE: &str = "/var/lib/flexnbd";
/// How many clients the units themselves provide for.
const CLIENTS_PROVIDED_FOR: usize = 1024;
/// Threads of a server besides those of its clients, generously.
const OTHER_THREADS: usize = 64;
/// Where the sockets are that nobody asked for elsewhere.
const RUN: &str = "/run/flexnbd";
/// Where the templates are, for links to them.
const TEMPLATES: &str = "/usr/lib/systemd/system";

/// What is to be there below the directory that the service manager reads.
#[derive(Debug, Default, PartialEq, Eq)]
struct Generated {
    /// Path → text.
    files: BTreeMap<String, String>,
    /// Path → what it links to.
    links: BTreeMap<String, String>,
    /// What is wrong with the configuration, if anything.
    complaint: Option<String>,
}

fn main() -> ExitCode {
    // The first directory is for units that yield to those in /etc and go before those in /usr.
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        warn(PROGRAM, "started by systemd with three directories; see systemd.generator(7)");
        return ExitCode::from(2);
    };
    let mut outcome = ExitCode::SUCCESS;
    for file in configurations_in(&instance::configurations()) {
        let Some(instance) = instance_of(&file) else { continue };
        let generated = match instance {
            Ok(name) => generate(&name, &file, read(&file).as_deref().map_err(String::clone)),
            Err(why) => Generated { complaint: Some(why), ..Generated::default() },
        };
        if let Some(complaint) = &generated.complaint {
            warn(PROGRAM, complaint);
        }
        if let Err(error) = generated.write(&directory) {
            let failed = format!("{}: cannot write below {}", file.display(), directory.display());
            warn(PROGRAM, &format!("{failed}: {error}"));
            outcome = ExitCode::FAILURE;
        }
    }
    outcome
}

/// Everything in the directory, in order; nothing if it cannot be read, or is not there.
fn configurations_in(directory: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            warn(PROGRAM, &format!("cannot read {}: {error}", directory.display()));
            return Vec::new();
        }
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort_unstable();
    files
}

/// The text of a configuration file.
fn read(file: &Path) -> Result<String, String> {
    let bytes = small_file::read(file, config::BYTES_MAX).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned())
}

impl Generated {
    fn write(&self, directory: &Path) -> io::Result<()> {
        let place = |path: &str| {
            let path = directory.join(path);
            path.parent().map_or(Ok(()), fs::create_dir_all).map(|()| path)
        };
        for (path, text) in &self.files {
            fs::write(place(path)?, text)?;
        }
        self.links.iter().try_for_each(|(path, target)| symlink(target, place(path)?))
    }
}

/// The instance that a file in the directory configures, or why it can configure none; nothing if
/// it is not meant to.
fn instance_of(file: &Path) -> Option<Result<String, String>> {
    let full = file.file_name()?.to_string_lossy();
    let name = full.strip_suffix(SUFFIX).filter(|_| !full.starts_with('.'))?;
    if !is_instance_name(name) || file.file_name() != Some(OsStr::new(&*full)) {
        return Some(Err(format!(
            "{}: the name of an instance has letters, digits and : - _ . @ only; skipped",
            file.display()
        )));
    }
    let fitting = name.parse::<Instance>().map(|_| name.to_owned());
    Some(fitting.map_err(|error| format!("{}: {error}; skipped", file.display())))
}

/// What a configuration is turned into. Pure.
///
/// A wrong one is turned into what can be made of it: the service refuses it and says why, but
/// clients wait where they are used to, and not on the default port, which may be somebody else's.
fn generate(name: &str, file: &Path, text: Result<&str, String>) -> Generated {
    let about = |why: String| format!("{}: {why}", file.display());
    let mut wrong = Vec::new();
    let settings = match text.map(|text| config::salvage(file, text)) {
        Ok((settings, error)) => {
            wrong.extend(error.map(|error| error.to_string()));
            settings
        }
        Err(why) => {
            wrong.push(about(why));
            Settings::default()
        }
    };
    let image = Image::of(&settings).map_err(|why| wrong.push(about(why))).ok();
    let place = place(&settings).map_err(|why| wrong.push(about(why))).unwrap_or_default();
    let nowhere = (!wrong.is_empty()).then(|| format!("{RUN}/{name}.none"));
    let autostart = settings.autostart.unwrap_or_default();
    let units = [
        (format!("flexnbd@{name}.socket.d"), socket(place.or(nowhere), &settings)),
        (format!("flexnbd@{name}.service.d"), service(&settings, image.as_ref())),
        // It writes, even if the disk is then served read-only.
        (format!("flexnbd-listen@{name}.service.d"), access(image.as_ref(), false)),
        ("multi-user.target.d".to_owned(), boot(autostart, image.as_ref())),
    ];
    let files = units.into_iter().filter(|(_, lines)| !lines.is_empty());
    // Drop-ins count in the order of their names: those of operators come later, and win.
    let path = |directory| format!("{directory}/00-flexnbd-{name}.conf");
    Generated {
        files: files.map(|(place, lines)| (path(place), drop_in(file, &lines))).collect(),
        links: links(name, autostart),
        complaint: wrong.into_iter().next(),
    }
}

/// A line of a drop-in, after the name of its section.
type Line = (&'static str, String);

fn drop_in(from: &Path, lines: &[Line]) -> String {
    let mut text = format!("# Made by {PROGRAM} from {}.\n", from.display());
    let mut current = "";
    for (section, line) in lines {
        if *section != current {
            text += &format!("\n[{section}]\n");
            current = section;
        }
        text += &format!("{line}\n");
    }
    text
}

/// What the socket unit listens on; nothing if the configuration leaves it to that.
fn place(settings: &Settings) -> Result<Option<String>, String> {
    Ok(instance::place(settings)?.map(|place| unspecific(&place)))
}

fn socket(place: Option<String>, settings: &Settings) -> Vec<Line> {
    let mut lines = Vec::new();
    if let Some(place) = place {
        // The empty one takes the template's away.
        lines.push(("Socket", "ListenStream=".to_owned()));
        lines.push(("Socket", format!("ListenStream={place}")));
    }
    if settings.ip_filter {
        let acl = Acl::parse(&settings.acl, settings.default_deny).unwrap_or_default();
        // Everybody is said, not left out: a filter that is in force stays when none takes its place.
        let everybody = acl.entries().is_empty() && !settings.default_deny;
        let admitted = if everybody { vec!["any".to_owned()] } else { acl.entries() };
        lines.push(("Socket", "IPAddressDeny=any".to_owned()));
        lines.extend(admitted.iter().map(|net| ("Socket", format!("IPAddressAllow={net}"))));
    }
    lines
}

fn service(settings: &Settings, image: Option<&Image>) -> Vec<Line> {
    let mut lines = access(image, settings.read_only);
    if let Some(clients) = settings.max_clients.filter(|number| *number > CLIENTS_PROVIDED_FOR) {
        // One more descriptor for what is to be known about the others.
        let room = clients + 1;
        lines.push(("Service", format!("FileDescriptorStoreMax={room}")));
        lines.push(("Service", format!("Environment=FDSTORE={room}")));
        lines.push(("Service", format!("TasksMax={}", clients + OTHER_THREADS)));
    }
    lines
}

/// Boot waits for the device of a disk that starts with it. The service alone does not wait, though
/// it comes after: who starts it by hand is to be told at once that the device is missing.
fn boot(autostart: Autostart, image: Option<&Image>) -> Vec<Line> {
    match (autostart, image) {
        (Autostart::Yes, Some(Image::Device(device))) => {
            vec![("Unit", format!("Wants={}", device_unit(device)))]
        }
        _ => Vec::new(),
    }
}

/// What `systemctl enable` would make.
fn links(name: &str, autostart: Autostart) -> BTreeMap<String, String> {
    let link = |target: &str, unit: &str, kind: &str| {
        let path = format!("{target}.wants/{unit}@{name}.{kind}");
        (path, format!("{TEMPLATES}/{unit}@.{kind}"))
    };
    let mut links = BTreeMap::new();
    if autostart != Autostart::No {
        links.extend(
            ["flexnbd", "flexnbd-control"].map(|unit| link("sockets.target", unit, "socket")),
        );
    }
    if autostart == Autostart::Yes {
        links.extend([link("multi-user.target", "flexnbd", "service")]);
    }
    links
}

/// Where the bytes are, by the look of the path: whatever it names may not be there yet.
enum Image {
    Device(String),
    File { path: String, directory: String },
}

impl Image {
    fn of(settings: &Settings) -> Result<Self, String> {
        let path = instance::image(settings)?;
        if path.starts_with("/dev/") && !path.starts_with("/dev/shm/") {
            return Ok(Self::Device(path));
        }
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory).to_owned();
        Ok(Self::File { path, directory })
    }
}

/// The gaps in the sandbox that the image takes.
fn access(image: Option<&Image>, read_only: bool) -> Vec<Line> {
    match image {
        None => Vec::new(),
        Some(Image::Device(path)) => device_access(path, read_only),
        Some(Image::File { path, directory }) if directory.is_empty() => file_access(path),
        Some(Image::File { directory, .. }) => file_access(directory),
    }
}

fn device_access(path: &str, read_only: bool) -> Vec<Line> {
    let rights = if read_only { "r" } else { "rw" };
    vec![
        ("Unit", format!("After={}", device_unit(path))),
        ("Service", "PrivateDevices=no".to_owned()),
        ("Service", format!("DeviceAllow={} {rights}", quoted(path))),
        // The group counts only where it is known.
        ("Service", "PrivateUsers=no".to_owned()),
        ("Service", "SupplementaryGroups=disk".to_owned()),
    ]
}

/// `place` is the image's directory: it is made and deleted there. A disk that is served read-only
/// is no exception, since its ownership record is written when it moves, to the image itself.
fn file_access(place: &str) -> Vec<Line> {
    let below =
        |directories: &[&str]| directories.iter().any(|it| Path::new(place).starts_with(it));
    // Missing (-) it is the image that is missing, which the program tells better.
    let optional = quoted(&format!("-{place}"));
    let mut lines = vec![("Unit", format!("RequiresMountsFor={}", quoted(place)))];
    if !below(&[STATE]) {
        lines.push(("Service", format!("ReadWritePaths={optional}")));
    }
    if below(&["/home", "/root", "/run/user"]) {
        // Nothing else there is to be seen.
        lines.push(("Service", "ProtectHome=tmpfs".to_owned()));
        lines.push(("Service", format!("BindPaths={optional}")));
    }
    if below(&["/tmp", "/var/tmp"]) {
        lines.push(("Service", "PrivateTmp=no".to_owned()));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOCKET: &str = "flexnbd@disk.socket.d/00-flexnbd-disk.conf";
    const SERVICE: &str = "flexnbd@disk.service.d/00-flexnbd-disk.conf";
    const RECEIVER: &str = "flexnbd-listen@disk.service.d/00-flexnbd-disk.conf";
    const BOOT: &str = "multi-user.target.d/00-flexnbd-disk.conf";

    fn made_of(text: &str) -> Generated {
        generate("disk", Path::new("/etc/flexnbd/disk.conf"), Ok(text))
    }

    /// The settings in a drop-in, without the comment; nothing if there is none.
    fn settings<'a>(made: &'a Generated, path: &str) -> Vec<&'a str> {
        let lines = made.files.get(path).map(String::as_str).unwrap_or_default().lines();
        lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
    }

    /// What `ListenStream=` becomes, and the complaint.
    fn listens(text: &str) -> (Option<String>, Option<String>) {
        let made = made_of(&format!("FILE=/a.img\n{text}"));
        let settings = settings(&made, SOCKET);
        if settings.is_empty() {
            return (None, made.complaint);
        }
        assert_eq!(settings[..2], ["[Socket]", "ListenStream="], "the template's stays");
        (settings[2].strip_prefix("ListenStream=").map(str::to_owned), made.complaint)
    }

    fn access(file: &str) -> Vec<String> {
        let made = made_of(&format!("FILE={file}"));
        assert_eq!(made.complaint, None, "{file}");
        assert_eq!(settings(&made, SERVICE), settings(&made, RECEIVER), "{file}");
        settings(&made, SERVICE).into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn a_drop_in_says_where_it_comes_from_and_has_sections() {
        let expected = "# Made by flexnbd-generator from /etc/flexnbd/disk.conf.\n\
            \n[Unit]\nRequiresMountsFor=\"/srv\"\n\
            \n[Service]\nReadWritePaths=\"-/srv\"\n";
        assert_eq!(made_of("FILE=/srv/a.img").files[SERVICE], expected);
    }

    #[test]
    fn the_socket_listens_on_address_and_port() {
        for (text, expected) in [
            ("ADDR=::\nPORT=10810", "[::]:10810"),
            ("ADDR=192.0.2.1\nPORT=7", "192.0.2.1:7"),
            ("ADDR=[2001:db8::1]\nPORT=7", "[2001:db8::1]:7"),
            ("ADDR=/run/a b.sock", "/run/a b.sock"),
            ("ADDR=/run/100%n", "/run/100%%n"),
        ] {
            assert_eq!(listens(text), (Some(expected.to_owned()), None), "{text}");
        }
        assert_eq!(listens(""), (None, None), "the template knows where");
    }

    #[test]
    fn where_nobody_can_listen_nobody_takes_the_default_port() {
        for (text, complaint) in [
            ("PORT=7", "/etc/flexnbd/disk.conf: PORT needs ADDR as well"),
            ("ADDR=::\nPORT=0", "/etc/flexnbd/disk.conf: PORT: a socket unit needs a port that"),
            ("ADDR=::\nPORT=x", "/etc/flexnbd/disk.conf, line 3: PORT: `x` is not a port"),
            ("ADDR='/a '", "/etc/flexnbd/disk.conf: ADDR: a socket unit cannot listen on /a "),
            ("ADDR=/a\\", "/etc/flexnbd/disk.conf: ADDR: a socket unit cannot listen on /a\\"),
            ("ADDR=/a/../b", "/etc/flexnbd/disk.conf: ADDR: /a/../b: a path with .. in it"),
            ("WHAT=1", "/etc/flexnbd/disk.conf, line 2: unknown key WHAT"),
        ] {
            let (listens, told) = listens(text);
            assert_eq!(listens.as_deref(), Some("/run/flexnbd/disk.none"), "{text}");
            let told = told.unwrap();
            assert!(told.starts_with(complaint), "{told}");
        }
        let path = |bytes: usize| format!("ADDR=/{}", "x".repeat(bytes - 1));
        assert_eq!(listens(&path(107)).1, None);
        assert!(listens(&path(108)).1.unwrap().contains("cannot listen"));
    }

    #[test]
    fn a_configuration_with_a_mistake_keeps_its_units_where_they_were() {
        let good = made_of("ADDR=::\nPORT=7\nFILE=/srv/a\nAUTOSTART=yes\n");
        let bad = made_of("ADDR=::\nPORT=7\nFILE=/srv/a\nAUTOSTART=yes\nPROT=8\n");
        assert_eq!((&good.files, &good.links), (&bad.files, &bad.links));
        let complaint = "/etc/flexnbd/disk.conf, line 5: unknown key PROT; perhaps PORT is meant";
        assert_eq!((good.complaint, bad.complaint.as_deref()), (None, Some(complaint)));
    }

    #[test]
    fn a_configuration_that_cannot_be_read_has_a_socket_out_of_the_way_and_a_complaint() {
        let file = Path::new("/etc/flexnbd/disk.conf");
        let made = generate("disk", file, Err("not a regular file".to_owned()));
        let complaint = "/etc/flexnbd/disk.conf: not a regular file";
        assert_eq!(made.complaint.as_deref(), Some(complaint));
        assert_eq!(settings(&made, SOCKET)[2], "ListenStream=/run/flexnbd/disk.none");
        assert_eq!((made.files.len(), made.links.len()), (1, 0));
    }

    #[test]
    fn a_file_takes_its_directory_along_and_nothing_more() {
        let mounts = |at| format!("RequiresMountsFor=\"{at}\"");
        let inside = mounts("/var/lib/flexnbd");
        assert_eq!(access("/var/lib/flexnbd/a.img"), ["[Unit]", &inside]);
        let service = |at| format!("ReadWritePaths=\"-{at}\"");
        for (file, at) in [
            ("/srv/disks//./a.img", "/srv/disks"),
            ("/srv/a b\"c\\d%e/a.img", "/srv/a b\\\"c\\\\d%%e"),
            ("/var/lib/flexnbd.old/a.img", "/var/lib/flexnbd.old"),
            ("/a.img", "/a.img"),
            ("/dev/shm/a.img", "/dev/shm"),
        ] {
            assert_eq!(access(file), ["[Unit]", &mounts(at), "[Service]", &service(at)], "{file}");
        }
    }

    #[test]
    fn of_a_home_only_the_directory_of_the_image_is_seen() {
        for at in ["/home/u/disks", "/root", "/run/user/7"] {
            let (writable, bound) =
                (format!("ReadWritePaths=\"-{at}\""), format!("BindPaths=\"-{at}\""));
            let lines = access(&format!("{at}/a.img"));
            assert_eq!(lines[3..], [&*writable, "ProtectHome=tmpfs", &*bound], "{at}");
        }
        assert!(!access("/homeless/a.img").iter().any(|line| line.contains("ProtectHome")));
    }

    #[test]
    fn an_image_in_tmp_is_in_the_one_that_everybody_sees() {
        for file in ["/tmp/a.img", "/var/tmp/x/a.img"] {
            assert_eq!(access(file).last().map(String::as_str), Some("PrivateTmp=no"), "{file}");
        }
    }

    #[test]
    fn a_block_device_is_one_by_the_look_of_its_path() {
        let expected = [
            "[Unit]",
            "After=dev-vg-my\\x2ddisk.device",
            "[Service]",
            "PrivateDevices=no",
            "DeviceAllow=\"/dev/vg/my-disk\" rw",
            "PrivateUsers=no",
            "SupplementaryGroups=disk",
        ];
        assert_eq!(access("/dev/vg/my-disk"), expected);
    }

    #[test]
    fn a_device_that_is_served_read_only_is_received_into_all_the_same() {
        let made = made_of("FILE=/dev/sdz\nREAD_ONLY=yes");
        assert!(settings(&made, SERVICE).contains(&"DeviceAllow=\"/dev/sdz\" r"));
        assert!(settings(&made, RECEIVER).contains(&"DeviceAllow=\"/dev/sdz\" rw"));
    }

    #[test]
    fn a_file_that_no_unit_can_name_is_complained_about() {
        for (file, why) in [
            ("FILE=/srv/../a", "FILE: /srv/../a: a path with .. in it cannot be in a unit"),
            ("FILE=a.img", "FILE: a.img: a path in a unit begins with /"),
            ("FILE=/srv/\u{1}/a", "such characters cannot be in a unit"),
            ("", "there is no FILE="),
        ] {
            let made = made_of(&format!("ADDR=::\nPORT=7\n{file}"));
            assert!(made.complaint.unwrap().ends_with(why), "{why}");
            assert_eq!(made.files.keys().collect::<Vec<_>>(), [SOCKET], "{file}");
        }
    }

    #[test]
    fn the_fd_store_has_room_for_as_many_clients_as_may_come() {
        let made = |clients| made_of(&format!("FILE={STATE}/a\nMAX_CLIENTS={clients}"));
        assert!(!made(1024).files[SERVICE].contains("[Service]"), "the unit provides for them");
        let made = made(1025);
        let expected = ["FileDescriptorStoreMax=1026", "Environment=FDSTORE=1026", "TasksMax=1089"];
        assert_eq!(settings(&made, SERVICE)[3..], expected);
        assert!(!made.files[RECEIVER].contains("[Service]"), "nobody is carried over there");
    }

    #[test]
    fn an_acl_is_a_filter_only_if_asked_for() {
        let filter = |text| {
            let made = made_of(&format!("FILE=/a\n{text}"));
            settings(&made, SOCKET).join(" ")
        };
        assert_eq!(filter("ACL=::1"), "");
        assert_eq!(filter("IP_FILTER=yes"), "[Socket] IPAddressDeny=any IPAddressAllow=any");
        assert_eq!(filter("IP_FILTER=yes\nDEFAULT_DENY=yes"), "[Socket] IPAddressDeny=any");
        let expected =
            "[Socket] IPAddressDeny=any IPAddressAllow=192.0.2.0/24 IPAddressAllow=::1/128";
        assert_eq!(filter("IP_FILTER=yes\nACL=::ffff:192.0.2.7/120 ::1"), expected);
    }

    #[test]
    fn autostart_wants_the_service_or_its_sockets() {
        let links = |autostart| made_of(&format!("FILE=/a\nAUTOSTART={autostart}")).links;
        let link =
            |path: &str, to: &str| (path.to_owned(), format!("/usr/lib/systemd/system/{to}"));
        let sockets = [
            link("sockets.target.wants/flexnbd@disk.socket", "flexnbd@.socket"),
            link("sockets.target.wants/flexnbd-control@disk.socket", "flexnbd-control@.socket"),
        ];
        let service = link("multi-user.target.wants/flexnbd@disk.service", "flexnbd@.service");
        assert_eq!(links("no"), BTreeMap::new());
        assert_eq!(links("on-demand"), BTreeMap::from(sockets.clone()));
        let all = sockets.into_iter().chain([service]).collect();
        assert_eq!(links("yes"), all);
    }

    #[test]
    fn boot_waits_for_the_device_of_a_disk_that_starts_with_it() {
        let boot = |text| settings(&made_of(text), BOOT).join(" ");
        assert_eq!(boot("FILE=/dev/sdz\nAUTOSTART=yes"), "[Unit] Wants=dev-sdz.device");
        assert_eq!(boot("FILE=/dev/sdz\nAUTOSTART=on-demand"), "");
        assert_eq!(boot("FILE=/srv/a\nAUTOSTART=yes"), "");
    }

    #[test]
    fn only_names_that_units_can_have_are_instances() {
        let instance = |name: &str| instance_of(&Path::new("/etc/flexnbd").join(name));
        assert_eq!(instance("a-b_c.d@e.conf"), Some(Ok("a-b_c.d@e".to_owned())));
        for name in ["disk.conf~", "disk.conf.dpkg-old", ".disk.conf", ".conf", "README"] {
            assert_eq!(instance(name), None, "{name}");
        }
        for name in ["a b.conf", "\u{e4}.conf", "a%b.conf"] {
            let why = instance(name).unwrap().unwrap_err();
            assert!(why.contains("letters, digits and : - _ . @ only; skipped"), "{why}");
        }
        let long = instance(&format!("{}.conf", "x".repeat(90))).unwrap().unwrap_err();
        assert!(long.contains("longer than the 89 bytes of a name; skipped"), "{long}");
    }

    proptest! {
        #[test]
        fn no_configuration_can_put_a_setting_of_its_own_into_a_unit(
            path in "/[ -~\u{80}-\u{ff}\t\u{b}\u{85}]{0,30}",
        ) {
            let text = format!("ADDR='{path}'\nFILE='{path}'");
            for line in made_of(&text).files.values().flat_map(|text| text.lines()) {
                let known = ["# Made by", "[", "ListenStream=", "RequiresMountsFor=\"", "PrivateTmp=no",
                    "ReadWritePaths=\"-", "After=", "PrivateDevices=no", "DeviceAllow=\"",
                    "PrivateUsers=no", "SupplementaryGroups=disk", "BindPaths=\"-", "ProtectHome="];
                prop_assert!(line.is_empty() || known.iter().any(|known| line.starts_with(known)), "{line}");
                prop_assert!(!line.ends_with('\\'), "{line}");
            }
        }
    }
}
