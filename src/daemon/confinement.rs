//! Confines the process when it has opened what it could not open later: the user that it becomes, and the
//! sandbox. Says which files it needs from then on.
//!
//! The order of a start, in one thread:
//!
//! 1. with a user to become: the sockets, while the process is root;
//! 2. the image;
//! 3. the user, so that the record of the image is tried as that user;
//! 4. the record, whose directory is known then;
//! 5. the sandbox;
//! 6. the writer of the log, and all other threads.
//!
//! A second start in the same process finds it confined already.

use super::config::{Config, ConfinementConfig, DiskConfig, ImageConfig, UpstreamConfig};
use super::start_error::StartError;
use crate::disk::record_store::RecordStore;
use crate::net::tls::{CLIENT_TRUST_STORE, TlsFiles, credentials_directory};
use crate::net::{Address, Remote, visible_user};
use crate::sandbox::rules::{ImageFiles, NameLookups, Needs};
use crate::sandbox::user::{Account, UserName};
use crate::sandbox::{self, Restrictions, drop_capabilities};
use crate::systemd::journal;
use nix::unistd::chown;
use std::cell::Cell;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// The word of `status` for a process that the operator has not confined.
const OFF: &str = "off";

/// The confinement of the process: planned, then in force.
#[derive(Debug)]
pub(super) struct Confinement {
    config: ConfinementConfig,
    /// What it needs, without the image.
    needs: Needs,
    no_tcp_connect: bool,
    /// The user to become, until the process is that user.
    account: Cell<Option<Account>>,
    /// The restrictions in force, as a word of `status`; none before.
    in_force: Cell<Option<&'static str>>,
}

impl Confinement {
    /// The plan for a process with this configuration.
    pub(super) fn plan(config: &Config) -> Self {
        let (names, receives) = match &config.disk {
            DiskConfig::Image(image) if image.receiving.is_some() => (NameLookups::Never, true),
            // `mirror --relay-to HOST`.
            DiskConfig::Image(_) => (NameLookups::Rarely, false),
            DiskConfig::Upstream(upstream) => (lookups(upstream), false),
        };
        let nbd = match &config.address {
            Some(Address::Unix(path)) => Some(path.clone()),
            _ => None,
        };
        let sockets = nbd.into_iter().chain(config.control.clone()).collect();
        let mut plan = Self::of(&config.confinement, sockets);
        plan.needs.names = names;
        plan.no_tcp_connect = receives;
        plan.needs.read_again.extend(with_targets(tls_files(config)));
        plan
    }

    /// The plan for a process that only refuses clients, since its configuration cannot be used.
    pub(super) fn refusing(config: &ConfinementConfig, control: Option<&Path>) -> Self {
        let mut plan = Self::of(config, control.into_iter().map(Path::to_owned).collect());
        plan.no_tcp_connect = true;
        plan
    }

    fn of(config: &ConfinementConfig, sockets: Vec<PathBuf>) -> Self {
        let read_again = with_targets(config.read_again.clone());
        Self {
            needs: Needs { sockets, read_again, ..Needs::default() },
            no_tcp_connect: false,
            account: Cell::default(),
            in_force: Cell::default(),
            config: config.clone(),
        }
    }

    /// Looks up the user to become, unless the process is that user already.
    pub(super) fn find_user(&self) -> Result<(), StartError> {
        let pending = self.config.user.as_ref().map(UserName::pending).transpose();
        self.account.set(pending.map_err(StartError::User)?.flatten());
        Ok(())
    }

    /// Whether the process is still to become another user.
    pub(super) fn will_switch_user(&self) -> bool {
        self.account.get().is_some()
    }

    /// Gives a file that root has just made to the user that the process will become.
    pub(super) fn give(&self, path: &Path) -> Result<(), StartError> {
        let Some(Account { uid, gid }) = self.account.get() else { return Ok(()) };
        chown(path, Some(uid), Some(gid))
            .map_err(|errno| StartError::NotGiven { path: path.to_owned(), source: errno.into() })
    }

    /// Becomes the configured user, unless the process is that user.
    pub(super) fn switch_user(&self) -> Result<(), StartError> {
        match (&self.config.user, self.account.take()) {
            (Some(user), Some(account)) => user.switch_to(account).map_err(StartError::User),
            _ => Ok(()),
        }
    }

    /// Confines a process with this image.
    pub(super) fn enter_with_image(&self, config: &ImageConfig, records: &RecordStore) {
        if self.config.sandbox && self.in_force.get().is_none() {
            // A full file system may force a record into it, and it could not be made then.
            records.make_directory();
        }
        // An image without links in its path: a rule holds for the directory that contains the file.
        let image = fs::canonicalize(&config.path).unwrap_or_else(|_| config.path.clone());
        let kind = fs::metadata(&image).map(|found| found.file_type());
        self.enter(Needs {
            image: Some(ImageFiles {
                is_device: kind.is_ok_and(|kind| kind.is_block_device()),
                image,
                read_only: config.read_only,
                state: records.directory().to_owned(),
            }),
            ..self.needs.clone()
        });
    }

    /// Confines a process without an image.
    pub(super) fn enter_without_image(&self) {
        self.enter(self.needs.clone());
    }

    /// The restrictions in force, as a word of `status`.
    pub(super) fn word(&self) -> &'static str {
        self.in_force.get().unwrap_or(OFF)
    }

    fn enter(&self, needs: Needs) {
        if self.in_force.get().is_some() {
            return;
        }
        self.in_force.set(Some(OFF));
        if self.config.sandbox {
            self.restrict(&needs);
        }
        journal::start_writer();
    }

    fn restrict(&self, needs: &Needs) {
        // Reads `/proc/self/uid_map`, and keeps the answer.
        let _ = visible_user(0);
        if let Err(error) = drop_capabilities() {
            warn!("cannot drop capabilities: {error}");
        }
        let restrictions =
            Restrictions { paths: needs.rules(), no_tcp_connect: self.no_tcp_connect };
        let confined = sandbox::enter(&restrictions);
        info!("sandbox: {confined}");
        self.in_force.set(Some(confined.word()));
    }
}

/// The paths, and the files that they lead to: a rule for the directory of a link does not hold for those.
fn with_targets(mut paths: Vec<PathBuf>) -> Vec<PathBuf> {
    let targets: Vec<_> = paths.iter().filter_map(|path| fs::canonicalize(path).ok()).collect();
    paths.extend(targets);
    paths
}

/// The files that a reload reads for TLS, and that `mirror` may name: the authorities of the host, and
/// credentials.
fn tls_files(config: &Config) -> Vec<PathBuf> {
    let server = config.admission.tls.as_ref().map(|tls| &tls.files);
    let files = server.into_iter().chain(config.upstream_tls());
    let mut paths: Vec<PathBuf> = files.flat_map(TlsFiles::paths).collect();
    paths.push(CLIENT_TRUST_STORE.into());
    paths.extend(credentials_directory().map(|directory| directory.join("NAME")));
    paths
}

/// How often a proxy of these servers looks up names.
fn lookups(upstream: &UpstreamConfig) -> NameLookups {
    let is_name = |remote: &Remote| match remote {
        Remote::Host { host, .. } => host.parse::<IpAddr>().is_err(),
        Remote::Unix(_) => false,
    };
    match upstream.targets.iter().any(|target| is_name(&target.remote)) {
        true => NameLookups::Always,
        false => NameLookups::Never,
    }
}
