//! `serve` and `listen`: merges flags and configuration file into the daemon's [`Config`].
//! Reads the configuration file and opens nothing else; the daemon opens image and sockets.

use super::config;
use super::instance::{self, is_service_config};
use super::settings::{ListenAddressError, Settings};
use crate::daemon::{Admission, Config, ProcessRole, RereadConfig};
use crate::server::CLIENTS_MAX;
use crate::server::acl::Acl;
use crate::small_file::{self, ReadError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A `serve` or `listen` command line, before the configuration file is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRequest {
    /// Serve a disk, or receive one.
    pub role: ProcessRole,
    /// The settings given by flags; they take precedence over the file.
    pub settings: Settings,
    /// The path of the configuration file.
    pub config_file: Option<PathBuf>,
}

/// Why a process cannot start; holds a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartRequestError {
    /// The command line is invalid.
    #[error("{0}")]
    Misuse(String),
    /// The configuration file cannot be read, or is invalid.
    #[error("{0}")]
    Config(String),
}

impl StartRequest {
    /// The mode of the command line.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self.role {
            ProcessRole::Serve => "serve",
            ProcessRole::Listen { .. } => "listen",
        }
    }

    /// Reads the configuration file, if there is one, and merges it with the flags.
    ///
    /// # Errors
    /// [`StartRequestError`].
    pub fn load(&self) -> Result<Config, StartRequestError> {
        let text =
            self.config_file.as_deref().map(read).transpose().map_err(StartRequestError::Config)?;
        self.merge(text.as_deref())
    }

    /// Reads the configuration file again for a reload; `None` if there is no file.
    #[must_use]
    pub fn reread(&self) -> Option<RereadConfig> {
        self.config_file.as_ref()?;
        let request = self.clone();
        Some(RereadConfig(Box::new(move || {
            request.load().map(|config| config.admission).map_err(|error| error.to_string())
        })))
    }

    /// Merges the flags with the text of the configuration file.
    fn merge(&self, text: Option<&str>) -> Result<Config, StartRequestError> {
        let file = match (&self.config_file, text) {
            (Some(path), Some(text)) => config::parse(path, text)
                .map_err(|error| StartRequestError::Config(error.to_string()))?,
            _ => Settings::default(),
        };
        let settings = self.settings.clone().or(file);
        let settings = match self.role {
            ProcessRole::Serve => settings.for_serve(),
            ProcessRole::Listen { .. } => settings.for_listen(),
        };
        let acl = Acl::parse(&settings.acl, settings.default_deny)
            .map_err(|error| StartRequestError::Misuse(error.to_string()))?;
        let clients_max = settings.max_clients.unwrap_or(CLIENTS_MAX);
        if let Some(file) = self.config_file.as_deref().filter(|file| is_service_config(file))
            && settings.file.is_some()
            && settings.address().is_ok()
        {
            let invalid = |why| StartRequestError::Config(format!("{}: {why}", file.display()));
            instance::check(&settings).map_err(invalid)?;
        }
        let address = settings
            .address()
            .map_err(|error| StartRequestError::Misuse(self.describe_address_error(&error)))?;
        let image = settings.file.ok_or_else(|| StartRequestError::Misuse(self.image_missing()))?;
        Ok(Config {
            role: self.role,
            config_file: self.config_file.clone(),
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
            direct: settings.direct,
            admission: Admission { acl, clients_max },
        })
    }

    fn image_missing(&self) -> String {
        match &self.config_file {
            None => "--file FILE is missing".to_owned(),
            Some(path) => format!("{} has no FILE=", path.display()),
        }
    }

    /// Names the options if one of them is involved, else the keys of the file.
    fn describe_address_error(&self, error: &ListenAddressError) -> String {
        match &self.config_file {
            Some(path) if self.settings.addr.is_none() && self.settings.port.is_none() => {
                format!("{}: {}", path.display(), error.with_keys())
            }
            _ => error.to_string(),
        }
    }
}

/// Reads a configuration file: a regular file of at most [`config::BYTES_MAX`].
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
            config_file: config.map(PathBuf::from),
        }
    }

    fn file(path: &str) -> Settings {
        Settings { file: Some(path.into()), ..Settings::default() }
    }

    #[test]
    fn missing_settings_have_defaults() {
        assert_eq!(serve(file("/a"), None).load(), Ok(Config::serve("/a")));
    }

    #[test]
    fn every_key_reaches_the_config() {
        let text = "ADDR=::\nPORT=7\nFILE=/a\nCREATE=1M\nSOCK=/b\nDEFAULT_DENY=1\nKILLSWITCH=1\n\
            READ_ONLY=1\nEXPORT=disk\nOLDSTYLE=1\nPLAIN=1\nMAX_CLIENTS=3\nIDLE_EXIT=60\nHOLES=ignore\n\
            DIRECT=yes\nACL=::1\n";
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
            direct: true,
            admission: Admission { acl: Acl::parse(&["::1"], true).unwrap(), clients_max: 3 },
        };
        let request = serve(Settings::default(), Some("disk.conf"));
        assert_eq!(request.merge(Some(text)), Ok(expected));
    }

    #[test]
    fn listen_ignores_keys_that_only_serve_uses() {
        let text = "FILE=/a\nEXPORT=disk\nACL=::1\nKILLSWITCH=1\nREAD_ONLY=1\nMAX_CLIENTS=3\n\
            IDLE_EXIT=60\nPLAIN=1\nDIRECT=yes\n";
        let role =
            ProcessRole::Listen { overwrite: true, records: crate::daemon::RecordPolicy::Required };
        let request = StartRequest { role, ..serve(Settings::default(), Some("disk.conf")) };
        let config = request.merge(Some(text)).unwrap();
        let admission = Admission { acl: Acl::parse(&["::1"], false).unwrap(), clients_max: 128 };
        assert_eq!(
            (config.role, config.export.as_str(), config.admission),
            (role, "disk", admission)
        );
        assert_eq!((config.killswitch, config.read_only, config.idle_exit), (false, false, None));
        assert!(config.plain && config.direct);
    }

    #[test]
    fn flags_take_precedence_over_the_file() {
        let request = serve(file("/flag"), Some("disk.conf"));
        let config = request.merge(Some("FILE=/file\nEXPORT=file\n")).unwrap();
        assert_eq!((config.image, config.export), ("/flag".into(), "file".to_owned()));
    }

    #[test]
    fn a_missing_image_is_misuse() {
        let misuse = |text: &str| Err(StartRequestError::Misuse(text.to_owned()));
        let request = serve(Settings::default(), None);
        assert_eq!(request.load(), misuse("--file FILE is missing"));
        let request = serve(Settings::default(), Some("disk.conf"));
        let expected = misuse("disk.conf has no FILE=");
        assert_eq!(request.merge(Some("")), expected);
    }

    #[test]
    fn address_and_port_from_different_sources_must_fit() {
        let request = serve(Settings { port: Some(7), ..file("/a") }, Some("disk.conf"));
        let error = request.merge(Some("ADDR=/run/x\n")).unwrap_err();
        assert!(
            matches!(error, StartRequestError::Misuse(text) if text.contains("/run/x is the path"))
        );
    }

    #[test]
    fn errors_in_the_file_name_its_keys() {
        let request = serve(file("/a"), Some("disk.conf"));
        let error = request.merge(Some("PORT=7\n"));
        assert_eq!(
            error,
            Err(StartRequestError::Misuse("disk.conf: PORT needs ADDR as well".into()))
        );
        let error = request.merge(Some("ADDR=::1\n"));
        assert_eq!(
            error,
            Err(StartRequestError::Misuse("disk.conf: ADDR ::1 needs PORT as well".into()))
        );
    }

    #[test]
    fn service_configs_must_be_expressible_in_units() {
        let text = "FILE=/a\nADDR=::\nPORT=0\n";
        let request = serve(Settings::default(), Some("/etc/flexnbd/disk.conf"));
        let why = "/etc/flexnbd/disk.conf: PORT: a socket unit needs a port that is not 0";
        assert_eq!(request.merge(Some(text)), Err(StartRequestError::Config(why.to_owned())));
        assert!(request.merge(Some("FILE=a\n")).is_err());
        let by_hand = serve(Settings::default(), Some("/srv/disk.conf"));
        assert!(by_hand.merge(Some(text)).is_ok() && by_hand.merge(Some("FILE=a\n")).is_ok());
    }

    #[test]
    fn invalid_value_in_the_file_is_a_config_error() {
        let request = serve(file("/a"), Some("disk.conf"));
        let expected = "disk.conf, line 1: PORT: `x` is not a port, a number up to 65535";
        let error = request.merge(Some("PORT=x\n"));
        assert_eq!(error, Err(StartRequestError::Config(expected.to_owned())));
    }

    #[test]
    fn an_unreadable_file_is_named_with_the_reason() {
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
            let request = serve(file("/a"), path.to_str());
            let text = format!("cannot read the configuration file {}: {why}", path.display());
            assert_eq!(request.load(), Err(StartRequestError::Config(text)));
        }
    }

    #[test]
    fn each_load_reads_the_file_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.conf");
        let request = serve(file("/a"), path.to_str());
        for limit in [1, 2] {
            fs::write(&path, format!("MAX_CLIENTS={limit}\n")).unwrap();
            assert_eq!(request.load().unwrap().admission.clients_max, limit);
        }
    }
}
