//! Turns each `/etc/flexnbd/NAME.conf` into drop-ins for the units of instance NAME, at boot and at
//! each daemon-reload: see systemd.generator(7).
//! Never accesses a disk, whose file system may not be mounted yet. An invalid configuration never
//! affects the units of other instances. An instance serves an image (`FILE`) or passes on the disk of
//! another server (`TO`).
//!
//! | key | becomes |
//! |---|---|
//! | `ADDR` `PORT` | `ListenStream=` of `flexnbd@NAME.socket`, or of `flexnbd-proxy@NAME.socket` |
//! | `FILE` | sandbox exceptions of `flexnbd@NAME.service` and `flexnbd-listen@NAME.service` |
//! | `TO` | sandbox exceptions of `flexnbd-proxy@NAME.service` |
//! | `FILE` `TO` | dependencies of `flexnbd-attach@NAME.service` |
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
#[cfg(any(test, fuzzing))]
#[path = "generator/fuzz_tests.rs"]
pub(crate) mod fuzz_tests;
#[path = "generator/sandbox.rs"]
mod sandbox;
#[cfg(test)]
#[path = "generator/tests.rs"]
mod tests;

use attach::{attach, device_link};
use flexnbd::cli::instance::Instance;
use flexnbd::cli::settings::{Autostart, Settings};
use flexnbd::cli::{config, instance};
use flexnbd::server::acl::Acl;
use flexnbd::small_file;
use flexnbd::systemd::unit::{device_unit, escape_specifiers, is_instance_name, warn};
use sandbox::{Image, access, socket_access};
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
    if let (Some(image), Some(upstream)) =
        (settings.first_image_key(), settings.upstream.first_key())
    {
        errors.push(in_file(format!("{image} and {upstream} exclude each other")));
    }
    let kinds = kinds(&settings);
    let image = match kinds {
        [Kind::Proxy] => None,
        _ => Image::of(&settings).map_err(|why| errors.push(in_file(why))).ok(),
    };
    let sockets = instance::upstream_sockets(&settings);
    let sockets = sockets.map_err(|why| errors.push(in_file(why))).unwrap_or_default();
    let address =
        socket_address(&settings).map_err(|why| errors.push(in_file(why))).unwrap_or_default();
    let unused_socket = (!errors.is_empty()).then(|| format!("{RUN}/{name}.none"));
    let autostart = settings.autostart.unwrap_or_default();
    let socket = socket(address.or(unused_socket), &settings);
    let mut units: Vec<(String, Vec<Line>)> = Vec::new();
    for kind in kinds {
        units.push((format!("{}@{name}.socket.d", kind.unit()), socket.clone()));
        let service = match kind {
            Kind::Disk => service(&settings, image.as_ref()),
            Kind::Proxy => proxy_service(&settings, &sockets),
        };
        units.push((format!("{}@{name}.service.d", kind.unit()), service));
    }
    // The receiver writes, even if the disk is later served read-only.
    units.push((format!("flexnbd-listen@{name}.service.d"), access(image.as_ref(), false)));
    units.push(("multi-user.target.d".to_owned(), boot(autostart, image.as_ref())));
    let mut links = kinds.first().map(|kind| links(name, *kind, autostart)).unwrap_or_default();
    // Not without a disk that can be served.
    if let [kind] = kinds
        && (image.is_some() || *kind == Kind::Proxy)
    {
        units.push((format!("flexnbd-attach@{name}.service.d"), attach(name, kind.unit())));
        links.extend([device_link(name)]);
    }
    let files = units.into_iter().filter(|(_, lines)| !lines.is_empty());
    // systemd applies drop-ins in the order of their names, so those of operators override ours.
    let path = |directory| format!("{directory}/00-flexnbd-{name}.conf");
    Generated {
        files: files.map(|(unit, lines)| (path(unit), drop_in(file, &lines))).collect(),
        links,
        error: errors.into_iter().next(),
    }
}

/// A kind of instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It serves an image.
    Disk,
    /// It passes on the disk of another server.
    Proxy,
}

impl Kind {
    /// The name of its units.
    fn unit(self) -> &'static str {
        match self {
            Self::Disk => "flexnbd",
            Self::Proxy => "flexnbd-proxy",
        }
    }

    /// The names of its socket units.
    fn sockets(self) -> [&'static str; 2] {
        match self {
            Self::Disk => ["flexnbd", "flexnbd-control"],
            Self::Proxy => ["flexnbd-proxy", "flexnbd-proxy-control"],
        }
    }
}

/// The kinds of instance that the settings may be meant for: both if an error hides that.
fn kinds(settings: &Settings) -> &'static [Kind] {
    match (settings.file.is_some(), settings.upstream.to.is_empty()) {
        (true, _) => &[Kind::Disk],
        (false, false) => &[Kind::Proxy],
        (false, true) => &[Kind::Disk, Kind::Proxy],
    }
}

/// A section, and one setting in it.
pub(crate) type Line = (&'static str, String);

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
    lines.extend(session_limits(settings));
    lines
}

fn proxy_service(settings: &Settings, sockets: &[String]) -> Vec<Line> {
    let mut lines = socket_access(sockets);
    lines.extend(session_limits(settings));
    lines
}

/// Limits for more clients than those of the packaged units allow.
fn session_limits(settings: &Settings) -> Vec<Line> {
    let Some(clients) = settings.max_clients.filter(|number| *number > UNIT_CLIENTS_MAX) else {
        return Vec::new();
    };
    // One more descriptor for the snapshot of the sessions.
    let descriptors = clients + 1;
    vec![
        ("Service", format!("FileDescriptorStoreMax={descriptors}")),
        ("Service", format!("Environment=FDSTORE={descriptors}")),
        ("Service", format!("TasksMax={}", clients + OTHER_THREADS)),
    ]
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
fn links(name: &str, kind: Kind, autostart: Autostart) -> BTreeMap<String, String> {
    let link = |target: &str, unit: &str, suffix: &str| {
        let path = format!("{target}.wants/{unit}@{name}.{suffix}");
        (path, format!("{TEMPLATES}/{unit}@.{suffix}"))
    };
    let mut links = BTreeMap::new();
    if autostart != Autostart::No {
        links.extend(kind.sockets().map(|unit| link("sockets.target", unit, "socket")));
    }
    if autostart == Autostart::Yes {
        links.extend([link("multi-user.target", kind.unit(), "service")]);
    }
    links
}
