//! The paths that a confined process may use, and for what. Pure.
//!
//! A rule for a directory holds for all files below it. So an image has a rule of its own, and its directory
//! only the rights that creating and deleting need. No rule is for the root directory, and thus for all files.

use std::path::{Path, PathBuf};

/// The use of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Read the file, or all files below the directory.
    Read,
    /// Read and write this file or device.
    ReadWrite,
    /// List the directory, make the names of regular files in it, and remove names. Gives no access to the
    /// content of a file.
    Names,
    /// Make unix sockets in the directory, and remove names.
    Sockets,
    /// Keep small files in the directory: list, make, read, write, remove.
    Files,
}

/// One path and its use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathRule {
    /// The path; a rule for one that does not exist has no effect.
    pub path: PathBuf,
    /// The use.
    pub grant: Grant,
}

/// How often a process looks up the names of other hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NameLookups {
    /// Never.
    #[default]
    Never,
    /// Only if an operator gives it a name.
    Rarely,
    /// Whenever it connects again, for as long as it runs.
    Always,
}

/// The files of the image of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFiles {
    /// The image's path, without symbolic links.
    pub image: PathBuf,
    /// It is a block device.
    pub is_device: bool,
    /// It is not written.
    pub read_only: bool,
    /// The directory of ownership records.
    pub state: PathBuf,
}

/// The files that a process needs after it has opened its image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The image, unless the disk is on another server.
    pub image: Option<ImageFiles>,
    /// The unix sockets that it makes.
    pub sockets: Vec<PathBuf>,
    /// The files that a reload reads again. An editor replaces a file, and the new one is another file
    /// to Landlock; so all files in their directories can be read.
    pub read_again: Vec<PathBuf>,
    /// How often it looks up names.
    pub names: NameLookups,
}

/// Files that every process uses.
const COMMON: &[(&str, Grant)] = &[
    ("/dev/null", Grant::ReadWrite),
    ("/dev/urandom", Grant::Read),
    // The limits of processors and memory.
    ("/proc/self/cgroup", Grant::Read),
    // The names in a backtrace.
    ("/proc/self/exe", Grant::Read),
    ("/sys/fs/cgroup", Grant::Read),
];

/// What the C library reads to look up a name: getaddrinfo(3), nsswitch.conf(5). It loads the modules of
/// nsswitch.conf as libraries.
const LOOKUP: &[&str] = &[
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/services",
    // The targets of /etc/resolv.conf, where it is a link. They are replaced when the network changes.
    "/run/NetworkManager",
    "/run/resolvconf",
    "/run/systemd/resolve",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];
/// The directory of the files of [`LOOKUP`], for processes that must see a file which replaces one of them.
const CONFIGURATION: &str = "/etc";
/// The attributes that identify a block device.
const DEVICES: &str = "/sys/devices";

impl Needs {
    /// The rules for these needs.
    #[must_use]
    pub fn rules(&self) -> Vec<PathRule> {
        let mut rules = Vec::new();
        let mut add = |path: &Path, grant| {
            if path != Path::new("/") {
                rules.push(PathRule { path: path.to_owned(), grant });
            }
        };
        COMMON.iter().for_each(|(path, grant)| add(Path::new(path), *grant));
        if self.names != NameLookups::Never {
            LOOKUP.iter().for_each(|path| add(Path::new(path), Grant::Read));
        }
        if self.names == NameLookups::Always {
            add(Path::new(CONFIGURATION), Grant::Read);
        }
        self.sockets.iter().for_each(|socket| add(directory_of(socket), Grant::Sockets));
        self.read_again.iter().for_each(|file| {
            add(file, Grant::Read);
            add(directory_of(file), Grant::Read);
        });
        if let Some(files) = &self.image {
            let access = if files.read_only { Grant::Read } else { Grant::ReadWrite };
            add(&files.image, access);
            add(&files.state, Grant::Files);
            match files.is_device {
                true => add(Path::new(DEVICES), Grant::Read),
                // `mirror --unlink` deletes the image.
                false => add(directory_of(&files.image), Grant::Names),
            }
        }
        rules
    }
}

/// The directory of a file; that of a bare name is the current one.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(is_device: bool, read_only: bool) -> Needs {
        let (image, state) = ("/srv/a/disk".into(), "/var/lib/flexnbd".into());
        let image = Some(ImageFiles { image, is_device, read_only, state });
        Needs { image, ..Needs::default() }
    }

    /// The rules besides those of every process, as text.
    fn special(needs: &Needs) -> Vec<String> {
        let rules = needs.rules().into_iter().skip(COMMON.len());
        rules.map(|rule| format!("{} {:?}", rule.path.display(), rule.grant)).collect()
    }

    #[test]
    fn content_of_other_images_is_not_granted() {
        let rules = ["/srv/a/disk ReadWrite", "/var/lib/flexnbd Files", "/srv/a Names"];
        assert_eq!(special(&image(false, false)), rules);
        assert_eq!(special(&image(false, true))[0], "/srv/a/disk Read");
    }

    #[test]
    fn a_device_grants_nothing_in_its_directory() {
        let rules = ["/srv/a/disk ReadWrite", "/var/lib/flexnbd Files", "/sys/devices Read"];
        assert_eq!(special(&image(true, false)), rules);
    }

    #[test]
    fn sockets_and_files_grant_their_directories() {
        let sockets = vec!["/run/x/s".into(), "bare".into()];
        let needs = Needs { sockets, read_again: vec!["/etc/f/c".into()], ..Needs::default() };
        let rules = ["/run/x Sockets", ". Sockets", "/etc/f/c Read", "/etc/f Read"];
        assert_eq!(special(&needs), rules);
    }

    #[test]
    fn no_rule_is_for_the_root_directory() {
        let mut needs = image(false, false);
        needs.image.as_mut().unwrap().image = "/disk".into();
        needs.sockets = vec!["/s".into()];
        needs.read_again = vec!["/c".into()];
        assert_eq!(special(&needs), ["/c Read", "/disk ReadWrite", "/var/lib/flexnbd Files"]);
    }

    #[test]
    fn etc_is_granted_only_for_constant_lookups() {
        let etc = |names| {
            let rules = special(&Needs { names, ..Needs::default() });
            let has = |rule: &str| rules.iter().any(|it| it == rule);
            (has("/etc Read"), has("/etc/resolv.conf Read"))
        };
        assert_eq!(etc(NameLookups::Never), (false, false));
        assert_eq!(etc(NameLookups::Rarely), (false, true));
        assert_eq!(etc(NameLookups::Always), (true, true));
    }
}
