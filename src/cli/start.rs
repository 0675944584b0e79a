//! What `serve` and `listen` have in common: from flags and configuration file to one plan.
//! Reads the file and nothing else; opening what the plan names is the daemon's part.

use super::config;
use super::instance::{self, is_of_the_service};
use super::settings::{AddressMissing, Settings};
use crate::daemon::{Admission, Config, ProcessRole, RereadConfig};
use crate::server::CLIENTS_MAX;
use crate::server::acl::Acl;
use crate::small_file::{self, ReadError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A process to be started, as far as the command line tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRequest {
    /// To serve a disk or to receive one.
    pub role: ProcessRole,
    /// What the configuration file can say as well.
    pub settings: Settings,
    /// The configuration file.
    pub config: Option<PathBuf>,
}

/// Why there is no plan; each holds a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartRequestError {
    /// The command line cannot be meant.
    Misuse(String),
    /// The configuration file cannot be read or is wrong.
    Config(String),
}

impl StartRequest {
    /// The mode of the command line that it is.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self.role {
            ProcessRole::Serve => "serve",
            ProcessRole::Listen { .. } => "listen",
        }
    }

    /// Makes the plan, reading the configuration file as it is now.
    ///
    /// # Errors
    /// [`StartRequestError`].
    pub fn plan(&self) -> Result<Config, StartRequestError> {
        let text =
            self.config.as_deref().map(read).transpose().map_err(StartRequestError::Config)?;
        self.plan_with(text.as_deref())
    }

    /// How to learn later what the configuration file then says, if there is one.
    #[must_use]
    pub fn reread(&self) -> Option<RereadConfig> {
        self.config.as_ref()?;
        let start = self.clone();
        Some(RereadConfig(Box::new(move || match start.plan() {
            Ok(plan) => Ok(plan.admission),
            Err(StartRequestError::Misuse(sentence) | StartRequestError::Config(sentence)) => {
                Err(sentence)
            }
        })))
    }

    /// [`StartRequest::plan`] with the text of the configuration file.
    fn plan_with(&self, text: Option<&str>) -> Result<Config, StartRequestError> {
        let file = match (&self.config, text) {
            (Some(path), Some(text)) => config::parse(path, text)
                .map_err(|error| StartRequestError::Config(error.to_string()))?,
            _ => Settings::default(),
        };
        let settings = self.settings.clone().over(file);
        let settings = match self.role {
            ProcessRole::Serve => settings.to_serve(),
            ProcessRole::Listen { .. } => settings.to_listen(),
        };
        let acl = Acl::parse(&settings.acl, settings.default_deny)
            .map_err(|bad| StartRequestError::Misuse(bad.to_string()))?;
        let clients_max = settings.max_clients.unwrap_or(CLIENTS_MAX);
        if let Some(file) = self.config.as_deref().filter(|file| is_of_the_service(file))
            && settings.file.is_some()
            && settings.address().is_ok()
        {
            let wrong = |why| StartRequestError::Config(format!("{}: {why}", file.display()));
            instance::check(&settings).map_err(wrong)?;
        }
        let address =
            settings.address().map_err(|error| StartRequestError::Misuse(self.nowhere(&error)))?;
        let image = settings.file.ok_or_else(|| StartRequestError::Misuse(self.image_missing()))?;
        Ok(Config {
            role: self.role,
            config_file: self.config.clone(),
            address,
            image,
            create: settings.create,
            read_only: settings.read_only,
            export: settings.export.unwrap_or_default(),
            oldstyle: settings.oldstyle,
            plain: settings.plain,
            control: settings.sock,
            killswitch: settings.killswitch,
            idle_exit: settings.idle_exit.map(Duration::from_secs),
            holes: settings.holes.unwrap_or_default(),
            admission: Admission { acl, clients_max },
        })
    }

    fn image_missing(&self) -> String {
        match &self.config {
            None => "--file FILE is missing".to_owned(),
            Some(path) => format!("{} has no FILE=", path.display()),
        }
    }

    /// In options, if one of them has a part in it; else in the keys of the file.
    fn nowhere(&self, error: &AddressMissing) -> String {
        match &self.config {
            Some(path) if self.settings.addr.is_none() && self.settings.port.is_none() => {
                format!("{}: {}", path.display(), error.in_keys())
            }
            _ => error.to_string(),
        }
    }
}

/// The text of a configuration file, which is a regular file of at most [`config::BYTES_MAX`].
///
/// # Errors
/// A sentence for the operator that names the file.
pub(super) fn read(path: &Path) -> Result<String, String> {
    let why = match small_file::read(path, config::BYTES_MAX) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => return Ok(text),
            Err(_) => "it is not UTF-8 text".to_owned(),
        },
        Err(ReadError::NotRegular) if path.is_dir() => "it is a directory".to_owned(),
        Err(ReadError::NotRegular) => "it is not a regular file".to_owned(),
        Err(ReadError::TooLong(bytes)) => format!("it is longer than {bytes} bytes"),
        Err(ReadError::Io(error)) => match error.kind() {
            io::ErrorKind::NotFound => "it does not exist".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            _ => error.to_string(),
        },
    };
    Err(format!("cannot read the configuration file {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::HolePolicy;
    use crate::net::Address;
    use nix::sys::stat::Mode;
    use std::fs;

    fn serve(flags: Settings, config: Option<&str>) -> StartRequest {
        StartRequest {
            role: ProcessRole::Serve,
            settings: flags,
            config: config.map(PathBuf::from),
        }
    }

    fn file(path: &str) -> Settings {
        Settings { file: Some(path.into()), ..Settings::default() }
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let expected = Config {
            role: ProcessRole::Serve,
            config_file: None,
            address: None,
            image: "/a".into(),
            create: None,
            read_only: false,
            export: String::new(),
            oldstyle: false,
            plain: false,
            control: None,
            killswitch: false,
            idle_exit: None,
            holes: HolePolicy::Auto,
            admission: Admission { acl: Acl::default(), clients_max: 128 },
        };
        assert_eq!(serve(file("/a"), None).plan(), Ok(expected));
    }

    #[test]
    fn everything_said_is_in_the_plan() {
        let text = "ADDR=::\nPORT=7\nFILE=/a\nCREATE=1M\nSOCK=/b\nDEFAULT_DENY=1\nKILLSWITCH=1\n\
            READ_ONLY=1\nEXPORT=disk\nOLDSTYLE=1\nPLAIN=1\nMAX_CLIENTS=3\nIDLE_EXIT=60\nHOLES=ignore\n\
            ACL=::1\n";
        let expected = Config {
            role: ProcessRole::Serve,
            config_file: Some("disk.conf".into()),
            address: Some(Address::Tcp("[::]:7".parse().unwrap())),
            image: "/a".into(),
            create: Some(1 << 20),
            read_only: true,
            export: "disk".to_owned(),
            oldstyle: true,
            plain: false,
            control: Some("/b".into()),
            killswitch: true,
            idle_exit: Some(Duration::from_secs(60)),
            holes: HolePolicy::Ignore,
            admission: Admission { acl: Acl::parse(&["::1"], true).unwrap(), clients_max: 3 },
        };
        let asked = serve(Settings::default(), Some("disk.conf"));
        assert_eq!(asked.plan_with(Some(text)), Ok(expected));
    }

    #[test]
    fn one_file_feeds_serve_and_listen_and_listen_passes_over_what_makes_no_sense_for_it() {
        let text = "FILE=/a\nEXPORT=disk\nACL=::1\nKILLSWITCH=1\nREAD_ONLY=1\nMAX_CLIENTS=3\n\
            IDLE_EXIT=60\nPLAIN=1\n";
        let role =
            ProcessRole::Listen { overwrite: true, records: crate::daemon::RecordPolicy::Required };
        let start = StartRequest { role, ..serve(Settings::default(), Some("disk.conf")) };
        let plan = start.plan_with(Some(text)).unwrap();
        let admission = Admission { acl: Acl::parse(&["::1"], false).unwrap(), clients_max: 128 };
        assert_eq!((plan.role, plan.export.as_str(), plan.admission), (role, "disk", admission));
        assert_eq!((plan.killswitch, plan.read_only, plan.idle_exit), (false, false, None));
        assert!(plan.plain);
    }

    #[test]
    fn flags_win_over_the_file() {
        let asked = serve(file("/flag"), Some("disk.conf"));
        let plan = asked.plan_with(Some("FILE=/file\nEXPORT=file\n")).unwrap();
        assert_eq!((plan.image, plan.export), ("/flag".into(), "file".to_owned()));
    }

    #[test]
    fn without_an_image_there_is_no_plan() {
        let misuse = |text: &str| Err(StartRequestError::Misuse(text.to_owned()));
        let asked = serve(Settings::default(), None);
        assert_eq!(asked.plan(), misuse("--file FILE is missing"));
        let asked = serve(Settings::default(), Some("disk.conf"));
        let expected = misuse("disk.conf has no FILE=");
        assert_eq!(asked.plan_with(Some("")), expected);
    }

    #[test]
    fn an_address_that_does_not_fit_is_misuse_wherever_its_halves_come_from() {
        let asked = serve(Settings { port: Some(7), ..file("/a") }, Some("disk.conf"));
        let refused = asked.plan_with(Some("ADDR=/run/x\n")).unwrap_err();
        assert!(
            matches!(refused, StartRequestError::Misuse(text) if text.contains("/run/x is the path"))
        );
    }

    #[test]
    fn messages_about_a_file_name_its_keys() {
        let asked = serve(file("/a"), Some("disk.conf"));
        let refused = asked.plan_with(Some("PORT=7\n"));
        assert_eq!(
            refused,
            Err(StartRequestError::Misuse("disk.conf: PORT needs ADDR as well".into()))
        );
        let refused = asked.plan_with(Some("ADDR=::1\n"));
        assert_eq!(
            refused,
            Err(StartRequestError::Misuse("disk.conf: ADDR ::1 needs PORT as well".into()))
        );
    }

    #[test]
    fn files_of_the_service_refuse_what_units_cannot_say() {
        let text = "FILE=/a\nADDR=::\nPORT=0\n";
        let refused = serve(Settings::default(), Some("/etc/flexnbd/disk.conf"));
        let why = "/etc/flexnbd/disk.conf: PORT: a socket unit needs a port that is not 0";
        assert_eq!(refused.plan_with(Some(text)), Err(StartRequestError::Config(why.to_owned())));
        assert!(refused.plan_with(Some("FILE=a\n")).is_err());
        let by_hand = serve(Settings::default(), Some("/srv/disk.conf"));
        assert!(
            by_hand.plan_with(Some(text)).is_ok() && by_hand.plan_with(Some("FILE=a\n")).is_ok()
        );
    }

    #[test]
    fn what_is_wrong_in_the_file_is_the_files_fault() {
        let asked = serve(file("/a"), Some("disk.conf"));
        let expected = "disk.conf, line 1: PORT: `x` is not a port, a number up to 65535";
        let refused = asked.plan_with(Some("PORT=x\n"));
        assert_eq!(refused, Err(StartRequestError::Config(expected.to_owned())));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("binary");
        fs::write(&binary, [0xff, 0xfe]).unwrap();
        let missing = dir.path().join("missing");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let long = dir.path().join("long");
        fs::write(&long, "#".repeat(config::BYTES_MAX as usize + 1)).unwrap();
        for (path, why) in [
            (&*pipe, "it is not a regular file"),
            (Path::new("/dev/zero"), "it is not a regular file"),
            (&*long, "it is longer than 1048576 bytes"),
            (missing.as_path(), "it does not exist"),
            (dir.path(), "it is a directory"),
            (&binary, "it is not UTF-8 text"),
        ] {
            let asked = serve(file("/a"), path.to_str());
            let text = format!("cannot read the configuration file {}: {why}", path.display());
            assert_eq!(asked.plan(), Err(StartRequestError::Config(text)));
        }
    }

    #[test]
    fn the_file_is_read_again_for_each_plan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.conf");
        let asked = serve(file("/a"), path.to_str());
        for limit in [1, 2] {
            fs::write(&path, format!("MAX_CLIENTS={limit}\n")).unwrap();
            assert_eq!(asked.plan().unwrap().admission.clients_max, limit);
        }
    }
}
