//! Turns each `/etc/flexnbd/NAME.conf` into drop-ins for the units of instance NAME, at boot and at
//! each daemon-reload: see systemd.generator(7).
//! Never accesses a disk, whose file system may not be mounted yet. An invalid configuration never
//! affects the units of other instances.
//!
//! | key | becomes |
//! |---|---|
//! | `ADDR` `PORT` | `ListenStream=` of `flexnbd@NAME.socket` |
//! | `FILE` | sandbox exceptions of `flexnbd@NAME.service` and `flexnbd-listen@NAME.service` |
//! | `FILE` | dependencies of `flexnbd-attach@NAME.service` |
//! | `MAX_CLIENTS` | size of the service's file descriptor store |
//! | `AUTOSTART` | links that start the instance, or its sockets, at boot |
//! | `ACL` with `IP_FILTER` | `IPAddressAllow=` of the socket |
//!
//! # Why `ACL` alone is no `IPAddressAllow=`
//!
//! `systemctl reload` and `flexnbd acl` change the list of a running server at once, and may admit
//! another client. Only a daemon-reload changes a filter in the socket unit, which would keep that
//! client out until then. It also drops packets silently, while the server closes the connection and
//! logs the peer. So the filter needs `IP_FILTER`.

#[path = "generator/attach.rs"]
mod attach;

use attach::{attach, device_link};
use flexnbd::cli::instance::Instance;
use flexnbd::cli::settings::{Autostart, Settings};
use flexnbd::cli::{config, instance};
use flexnbd::server::acl::Acl;
use flexnbd::small_file;
use flexnbd::systemd::unit::{device_unit, escape_specifiers, is_instance_name, quoted, warn};
use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The program's name in the log.
const PROGRAM: &str = "flexnbd-generator";
/// Suffix of a configuration file.
const SUFFIX: &str = ".conf";

/// `StateDirectory=` of the services.
const STATE: &str = "/var/lib/flexnbd";
/// Clients for which the limits of the packaged units suffice.
const UNIT_CLIENTS_MAX: usize = 1024;
/// Generous number of threads of a server besides those of its clients.
const OTHER_THREADS: usize = 64;
/// Directory of the sockets that replace an invalid address.
const RUN: &str = "/run/flexnbd";
/// Directory of the unit templates, the targets of our links.
const TEMPLATES: &str = "/usr/lib/systemd/system";

/// The files and links below the directory that the service manager reads.
#[derive(Debug, Default, PartialEq, Eq)]
struct Generated {
    /// Path → text.
    files: BTreeMap<String, String>,
    /// Path → target.
    links: BTreeMap<String, String>,
    /// The first error in the configuration.
    error: Option<String>,
}

fn main() -> ExitCode {
    // Units in the first directory override those in /usr, and units in /etc override them.
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        warn(PROGRAM, "started by systemd with three directories; see systemd.generator(7)");
        return ExitCode::from(2);
    };
    let mut outcome = ExitCode::SUCCESS;
    for file in configurations_in(&instance::config_directory()) {
        let Some(instance) = instance_of(&file) else { continue };
        let generated = match instance {
            Ok(name) => generate(&name, &file, read(&file).as_deref().map_err(String::clone)),
            Err(why) => Generated { error: Some(why), ..Generated::default() },
        };
        if let Some(error) = &generated.error {
            warn(PROGRAM, error);
        }
        if let Err(error) = generated.write(&directory) {
            let failed = format!("{}: cannot write below {}", file.display(), directory.display());
            warn(PROGRAM, &format!("{failed}: {error}"));
            outcome = ExitCode::FAILURE;
        }
    }
    outcome
}

/// The files in the directory, sorted; none if it is missing or cannot be read.
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
        let prepare = |path: &str| {
            let path = directory.join(path);
            path.parent().map_or(Ok(()), fs::create_dir_all).map(|()| path)
        };
        for (path, text) in &self.files {
            fs::write(prepare(path)?, text)?;
        }
        self.links.iter().try_for_each(|(path, target)| symlink(target, prepare(path)?))
    }
}

/// The instance that a file in the directory configures, or an error if its name is invalid; none
/// for a file that is no configuration.
fn instance_of(file: &Path) -> Option<Result<String, String>> {
    let full = file.file_name()?.to_string_lossy();
    let name = full.strip_suffix(SUFFIX).filter(|_| !full.starts_with('.'))?;
    if !is_instance_name(name) || file.file_name() != Some(OsStr::new(&*full)) {
        return Some(Err(format!(
            "{}: the name of an instance has letters, digits and : - _ . @ only; skipped",
            file.display()
        )));
    }
    let instance = name.parse::<Instance>().map(|_| name.to_owned());
    Some(instance.map_err(|error| format!("{}: {error}; skipped", file.display())))
}

/// The units of a configuration. Pure.
///
/// An invalid configuration yields the units of its valid settings: the service refuses to start and
/// logs the error, while clients wait at their usual address, and not at the default port, which may
/// belong to another instance.
fn generate(name: &str, file: &Path, text: Result<&str, String>) -> Generated {
    let in_file = |why: String| format!("{}: {why}", file.display());
    let mut errors = Vec::new();
    let settings = match text.map(|text| config::salvage(file, text)) {
        Ok((settings, error)) => {
            errors.extend(error.map(|error| error.to_string()));
            settings
        }
        Err(why) => {
            errors.push(in_file(why));
            Settings::default()
        }
    };
    let image = Image::of(&settings).map_err(|why| errors.push(in_file(why))).ok();
    let address =
        socket_address(&settings).map_err(|why| errors.push(in_file(why))).unwrap_or_default();
    let unused_socket = (!errors.is_empty()).then(|| format!("{RUN}/{name}.none"));
    let autostart = settings.autostart.unwrap_or_default();
    let attachment = image.as_ref().map(|_| attach(name, "flexnbd")).unwrap_or_default();
    let mut links = links(name, autostart);
    links.extend(image.as_ref().map(|_| device_link(name)));
    let units = [
        (format!("flexnbd@{name}.socket.d"), socket(address.or(unused_socket), &settings)),
        (format!("flexnbd@{name}.service.d"), service(&settings, image.as_ref())),
        // The receiver writes, even if the disk is later served read-only.
        (format!("flexnbd-listen@{name}.service.d"), access(image.as_ref(), false)),
        (format!("flexnbd-attach@{name}.service.d"), attachment),
        ("multi-user.target.d".to_owned(), boot(autostart, image.as_ref())),
    ];
    let files = units.into_iter().filter(|(_, lines)| !lines.is_empty());
    // systemd applies drop-ins in the order of their names, so those of operators override ours.
    let path = |directory| format!("{directory}/00-flexnbd-{name}.conf");
    Generated {
        files: files.map(|(unit, lines)| (path(unit), drop_in(file, &lines))).collect(),
        links,
        error: errors.into_iter().next(),
    }
}

/// A section, and one setting in it.
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

/// The address for `ListenStream=`; none if the configuration keeps that of the template.
fn socket_address(settings: &Settings) -> Result<Option<String>, String> {
    Ok(instance::listen_address(settings)?.map(|address| escape_specifiers(&address)))
}

fn socket(address: Option<String>, settings: &Settings) -> Vec<Line> {
    let mut lines = Vec::new();
    if let Some(address) = address {
        // The empty assignment resets that of the template.
        lines.push(("Socket", "ListenStream=".to_owned()));
        lines.push(("Socket", format!("ListenStream={address}")));
    }
    if settings.ip_filter {
        let acl = Acl::parse(&settings.acl, settings.default_deny).unwrap_or_default();
        // `any` is explicit, since systemd keeps an active filter when the setting disappears.
        let admits_all = acl.entries().is_empty() && !settings.default_deny;
        let admitted = if admits_all { vec!["any".to_owned()] } else { acl.entries() };
        lines.push(("Socket", "IPAddressDeny=any".to_owned()));
        lines.extend(admitted.iter().map(|net| ("Socket", format!("IPAddressAllow={net}"))));
    }
    lines
}

fn service(settings: &Settings, image: Option<&Image>) -> Vec<Line> {
    let mut lines = access(image, settings.read_only);
    if let Some(clients) = settings.max_clients.filter(|number| *number > UNIT_CLIENTS_MAX) {
        // One more descriptor for the snapshot of the sessions.
        let descriptors = clients + 1;
        lines.push(("Service", format!("FileDescriptorStoreMax={descriptors}")));
        lines.push(("Service", format!("Environment=FDSTORE={descriptors}")));
        lines.push(("Service", format!("TasksMax={}", clients + OTHER_THREADS)));
    }
    lines
}

/// Makes boot wait for the device of a disk that starts at boot. The service has `After=` only, so
/// that an operator who starts it by hand learns at once that the device is missing.
fn boot(autostart: Autostart, image: Option<&Image>) -> Vec<Line> {
    match (autostart, image) {
        (Autostart::Yes, Some(Image::Device(device))) => {
            vec![("Unit", format!("Wants={}", device_unit(device)))]
        }
        _ => Vec::new(),
    }
}

/// The links that `systemctl enable` would create.
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

/// The kind of image, judged by the path, since the image itself may not exist yet.
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

/// The sandbox exceptions that the image needs.
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
        // `PrivateUsers=` would map the group to nobody.
        ("Service", "PrivateUsers=no".to_owned()),
        ("Service", "SupplementaryGroups=disk".to_owned()),
    ]
}

/// Grants write access to the image's directory, where the image is created and deleted. A disk that
/// is served read-only needs it too, since a migration writes its ownership record to the image.
fn file_access(directory: &str) -> Vec<Line> {
    let below =
        |parents: &[&str]| parents.iter().any(|parent| Path::new(directory).starts_with(parent));
    // Optional (-), since the program reports a missing image better than systemd does.
    let optional = quoted(&format!("-{directory}"));
    let mut lines = vec![("Unit", format!("RequiresMountsFor={}", quoted(directory)))];
    if !below(&[STATE]) {
        lines.push(("Service", format!("ReadWritePaths={optional}")));
    }
    if below(&["/home", "/root", "/run/user"]) {
        // Hides everything else there.
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

    fn generate_from(text: &str) -> Generated {
        generate("disk", Path::new("/etc/flexnbd/disk.conf"), Ok(text))
    }

    /// The settings in a drop-in, without the comment; empty if there is no drop-in.
    fn settings<'a>(generated: &'a Generated, path: &str) -> Vec<&'a str> {
        let lines = generated.files.get(path).map(String::as_str).unwrap_or_default().lines();
        lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
    }

    /// The value of `ListenStream=`, and the error.
    fn listen_stream(text: &str) -> (Option<String>, Option<String>) {
        let generated = generate_from(&format!("FILE=/a.img\n{text}"));
        let settings = settings(&generated, SOCKET);
        if settings.is_empty() {
            return (None, generated.error);
        }
        assert_eq!(settings[..2], ["[Socket]", "ListenStream="], "keeps the template's address");
        (settings[2].strip_prefix("ListenStream=").map(str::to_owned), generated.error)
    }

    fn access(file: &str) -> Vec<String> {
        let generated = generate_from(&format!("FILE={file}"));
        assert_eq!(generated.error, None, "{file}");
        assert_eq!(settings(&generated, SERVICE), settings(&generated, RECEIVER), "{file}");
        settings(&generated, SERVICE).into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn drop_in_names_its_source_and_has_sections() {
        let expected = "# Made by flexnbd-generator from /etc/flexnbd/disk.conf.\n\
            \n[Unit]\nRequiresMountsFor=\"/srv\"\n\
            \n[Service]\nReadWritePaths=\"-/srv\"\n";
        assert_eq!(generate_from("FILE=/srv/a.img").files[SERVICE], expected);
    }

    #[test]
    fn socket_listens_on_address_and_port() {
        for (text, expected) in [
            ("ADDR=::\nPORT=10810", "[::]:10810"),
            ("ADDR=192.0.2.1\nPORT=7", "192.0.2.1:7"),
            ("ADDR=[2001:db8::1]\nPORT=7", "[2001:db8::1]:7"),
            ("ADDR=/run/a b.sock", "/run/a b.sock"),
            ("ADDR=/run/100%n", "/run/100%%n"),
        ] {
            assert_eq!(listen_stream(text), (Some(expected.to_owned()), None), "{text}");
        }
        assert_eq!(listen_stream(""), (None, None), "overrides the template without need");
    }

    #[test]
    fn invalid_address_does_not_fall_back_to_the_default() {
        for (text, expected) in [
            ("PORT=7", "/etc/flexnbd/disk.conf: PORT needs ADDR as well"),
            ("ADDR=::\nPORT=0", "/etc/flexnbd/disk.conf: PORT: a socket unit needs a port that"),
            ("ADDR=::\nPORT=x", "/etc/flexnbd/disk.conf, line 3: PORT: `x` is not a port"),
            ("ADDR='/a '", "/etc/flexnbd/disk.conf: ADDR: a socket unit cannot listen on /a "),
            ("ADDR=/a\\", "/etc/flexnbd/disk.conf: ADDR: a socket unit cannot listen on /a\\"),
            ("ADDR=/a/../b", "/etc/flexnbd/disk.conf: ADDR: /a/../b: a path with .. in it"),
            ("WHAT=1", "/etc/flexnbd/disk.conf, line 2: unknown key WHAT"),
        ] {
            let (address, error) = listen_stream(text);
            assert_eq!(address.as_deref(), Some("/run/flexnbd/disk.none"), "{text}");
            let error = error.unwrap();
            assert!(error.starts_with(expected), "{error}");
        }
        let path = |bytes: usize| format!("ADDR=/{}", "x".repeat(bytes - 1));
        assert_eq!(listen_stream(&path(107)).1, None);
        assert!(listen_stream(&path(108)).1.unwrap().contains("cannot listen"));
    }

    #[test]
    fn configuration_error_keeps_the_units_unchanged() {
        let good = generate_from("ADDR=::\nPORT=7\nFILE=/srv/a\nAUTOSTART=yes\n");
        let bad = generate_from("ADDR=::\nPORT=7\nFILE=/srv/a\nAUTOSTART=yes\nPROT=8\n");
        assert_eq!((&good.files, &good.links), (&bad.files, &bad.links));
        let error = "/etc/flexnbd/disk.conf, line 5: unknown key PROT; perhaps PORT is meant";
        assert_eq!((good.error, bad.error.as_deref()), (None, Some(error)));
    }

    #[test]
    fn unreadable_configuration_gets_an_unused_socket() {
        let file = Path::new("/etc/flexnbd/disk.conf");
        let generated = generate("disk", file, Err("not a regular file".to_owned()));
        let error = "/etc/flexnbd/disk.conf: not a regular file";
        assert_eq!(generated.error.as_deref(), Some(error));
        assert_eq!(settings(&generated, SOCKET)[2], "ListenStream=/run/flexnbd/disk.none");
        assert_eq!((generated.files.len(), generated.links.len()), (1, 0));
    }

    #[test]
    fn service_may_write_only_the_images_directory() {
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
    fn service_sees_only_the_images_directory_below_home() {
        for at in ["/home/u/disks", "/root", "/run/user/7"] {
            let (writable, bound) =
                (format!("ReadWritePaths=\"-{at}\""), format!("BindPaths=\"-{at}\""));
            let lines = access(&format!("{at}/a.img"));
            assert_eq!(lines[3..], [&*writable, "ProtectHome=tmpfs", &*bound], "{at}");
        }
        assert!(!access("/homeless/a.img").iter().any(|line| line.contains("ProtectHome")));
    }

    #[test]
    fn image_in_tmp_disables_private_tmp() {
        for file in ["/tmp/a.img", "/var/tmp/x/a.img"] {
            assert_eq!(access(file).last().map(String::as_str), Some("PrivateTmp=no"), "{file}");
        }
    }

    #[test]
    fn path_below_dev_is_a_block_device() {
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
    fn receiver_may_write_a_read_only_device() {
        let generated = generate_from("FILE=/dev/sdz\nREAD_ONLY=yes");
        assert!(settings(&generated, SERVICE).contains(&"DeviceAllow=\"/dev/sdz\" r"));
        assert!(settings(&generated, RECEIVER).contains(&"DeviceAllow=\"/dev/sdz\" rw"));
    }

    #[test]
    fn path_that_no_unit_can_express_is_an_error() {
        for (file, why) in [
            ("FILE=/srv/../a", "FILE: /srv/../a: a path with .. in it cannot be in a unit"),
            ("FILE=a.img", "FILE: a.img: a path in a unit begins with /"),
            ("FILE=/srv/\u{1}/a", "such characters cannot be in a unit"),
            ("", "there is no FILE="),
        ] {
            let generated = generate_from(&format!("ADDR=::\nPORT=7\n{file}"));
            assert!(generated.error.unwrap().ends_with(why), "{why}");
            assert_eq!(generated.files.keys().collect::<Vec<_>>(), [SOCKET], "{file}");
        }
    }

    #[test]
    fn fd_store_grows_with_max_clients() {
        let generated = |clients| generate_from(&format!("FILE={STATE}/a\nMAX_CLIENTS={clients}"));
        assert!(
            !generated(1024).files[SERVICE].contains("[Service]"),
            "the limits of the unit suffice"
        );
        let generated = generated(1025);
        let expected = ["FileDescriptorStoreMax=1026", "Environment=FDSTORE=1026", "TasksMax=1089"];
        assert_eq!(settings(&generated, SERVICE)[3..], expected);
        assert!(
            !generated.files[RECEIVER].contains("[Service]"),
            "the receiver stores no sessions"
        );
    }

    #[test]
    fn acl_becomes_an_ip_filter_only_with_ip_filter() {
        let filter = |text| {
            let generated = generate_from(&format!("FILE=/a\n{text}"));
            settings(&generated, SOCKET).join(" ")
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
        let links = |autostart| {
            let mut links = generate_from(&format!("FILE=/a\nAUTOSTART={autostart}")).links;
            assert!(links.remove(&device_link("disk").0).is_some());
            links
        };
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
    fn boot_waits_for_the_device_of_an_autostarted_disk() {
        let boot = |text| settings(&generate_from(text), BOOT).join(" ");
        assert_eq!(boot("FILE=/dev/sdz\nAUTOSTART=yes"), "[Unit] Wants=dev-sdz.device");
        assert_eq!(boot("FILE=/dev/sdz\nAUTOSTART=on-demand"), "");
        assert_eq!(boot("FILE=/srv/a\nAUTOSTART=yes"), "");
    }

    #[test]
    fn only_valid_unit_names_are_instances() {
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
        fn configuration_cannot_inject_settings_into_a_unit(
            path in "/[ -~\u{80}-\u{ff}\t\u{b}\u{85}]{0,30}",
        ) {
            let text = format!("ADDR='{path}'\nFILE='{path}'");
            let mut files = generate_from(&text).files;
            // Has no value of the configuration.
            files.retain(|path, _| !path.starts_with("flexnbd-attach@"));
            for line in files.values().flat_map(|text| text.lines()) {
                let known = ["# Made by", "[", "ListenStream=", "RequiresMountsFor=\"", "PrivateTmp=no",
                    "ReadWritePaths=\"-", "After=", "PrivateDevices=no", "DeviceAllow=\"",
                    "PrivateUsers=no", "SupplementaryGroups=disk", "BindPaths=\"-", "ProtectHome="];
                prop_assert!(line.is_empty() || known.iter().any(|known| line.starts_with(known)), "{line}");
                prop_assert!(!line.ends_with('\\'), "{line}");
            }
        }
    }
}
