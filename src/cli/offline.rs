//! `flexnbd status --file` and `--config`: the status of a disk without a server. Reads the image's size
//! and its ownership record; takes no lock and changes nothing. Connects to no upstream.

use super::settings::Settings;
use super::start::{self, ProcessRole, StartRequest};
use super::{config, output};
use crate::control::status::{self, DISK_ID, FLUSH_FAILED, OWNERSHIP, UPSTREAM};
use crate::daemon::{Config, DiskConfig};
use crate::disk::ownership::{Provenance, Record};
use crate::disk::record_store::{RecordStore, RecordStoreError, read_tombstone};
use crate::disk::{OpenError, image_size};
use crate::ids::DiskId;
use crate::net::tls::{ServerTls, TlsClient, TlsError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A `status` command for a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfflineStatus {
    /// The disk.
    pub disk: DiskArgument,
    /// Print it as JSON.
    pub json: bool,
}

/// Selects a disk by its image or by a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskArgument {
    /// The path of the image.
    File(PathBuf),
    /// The path of the configuration file, whose `FILE` is the image, or whose `TO` is the upstream.
    Config(PathBuf),
}

/// The disk that an argument selects.
enum SelectedDisk {
    /// The path of its image.
    Image(PathBuf),
    /// The addresses of its servers.
    Upstream(Vec<String>),
}

/// Prints the status of the disk.
#[must_use]
pub fn run(status: &OfflineStatus) -> ExitCode {
    match status.render() {
        Ok(text) => output::print(&text),
        Err(why) => output::print_error(&format!("flexnbd status: {why}"), output::EXIT_FAILURE),
    }
}

impl OfflineStatus {
    fn render(&self) -> Result<String, String> {
        let image = match self.disk.select()? {
            SelectedDisk::Image(image) => image,
            SelectedDisk::Upstream(addresses) => {
                let line = status::line(&[(UPSTREAM, addresses.join(","))]);
                return output::format_status(&line, self.json);
            }
        };
        let to_text = |error: RecordStoreError| error.to_string();
        let (size, record, disk_id) = match image_size(&image) {
            Ok(size) => {
                let (record, disk_id) = read(&image).map_err(to_text)?;
                (size, record, disk_id)
            }
            // A migration with --unlink may have deleted the image and left a tombstone.
            Err(error) => {
                let tombstone = read_tombstone(&image).map_err(to_text)?;
                (0, Some(tombstone.ok_or_else(|| describe_open_error(error))?), None)
            }
        };
        output::format_status(&status_line(&image, size, record.as_ref(), disk_id), self.json)
    }
}

impl DiskArgument {
    fn select(&self) -> Result<SelectedDisk, String> {
        let path = match self {
            Self::File(image) => return Ok(SelectedDisk::Image(image.clone())),
            Self::Config(path) => path,
        };
        // An error in the file is reported below.
        let is_proxy = !config::salvage(path, &start::read(path)?).0.upstream.to.is_empty();
        // Every error that would prevent the service from starting is an error here as well, so that
        // an operator can check a configuration before a restart.
        let request = StartRequest {
            role: if is_proxy {
                ProcessRole::Proxy { single_client: false }
            } else {
                ProcessRole::Serve
            },
            settings: Settings::default(),
            config_file: Some(path.clone()),
        };
        let config = request.load().map_err(|error| error.to_string())?;
        check_tls(&config)?;
        match config.disk {
            DiskConfig::Image(image) => Ok(SelectedDisk::Image(image.path)),
            DiskConfig::Upstream(upstream) => {
                let addresses = upstream.targets.iter().map(ToString::to_string);
                Ok(SelectedDisk::Upstream(addresses.collect()))
            }
        }
    }
}

/// Checks that the certificates can be used, as far as this user may read them.
fn check_tls(config: &Config) -> Result<(), String> {
    let failure = |error: TlsError| match error {
        TlsError::Forbidden { .. } => None,
        error => Some(error.to_string()),
    };
    let server = config.admission.tls.as_ref().filter(|tls| !tls.files.has_credential());
    let server = server.and_then(|tls| ServerTls::load(tls.mode, &tls.files, &tls.allow).err());
    let upstream = config.upstream_tls().filter(|files| !files.has_credential());
    let upstream = upstream.and_then(|files| TlsClient::load(files).err());
    [server, upstream].into_iter().flatten().find_map(failure).map_or(Ok(()), Err)
}

/// The record of the image, and the id of the disk in it.
fn read(image: &Path) -> Result<(Option<Record>, Option<DiskId>), RecordStoreError> {
    let store = RecordStore::at(image)?;
    let record = store.peek()?;
    let provenance = match &record {
        None => Provenance::Native,
        Some(
            Record::Ours(provenance)
            | Record::FlushFailed { provenance, .. }
            | Record::Departing { before: provenance, .. },
        ) => *provenance,
        Some(Record::Incoming { .. } | Record::Departed { .. }) => return Ok((record, None)),
    };
    let disk_id = store.disk_id(provenance)?;
    Ok((record, disk_id))
}

/// The status line: the pairs that every disk has, then those of its record.
fn status_line(
    image: &Path,
    size: u64,
    record: Option<&Record>,
    disk_id: Option<DiskId>,
) -> String {
    let mut pairs = vec![
        ("image", image.display().to_string()),
        ("size", size.to_string()),
        (OWNERSHIP, record.map_or("none", Record::name).to_owned()),
    ];
    match record {
        Some(Record::Departed { when, to, .. }) => {
            pairs.extend([("moved_to", to.to_string()), ("moved_at", when.to_string())]);
        }
        Some(Record::FlushFailed { since, .. }) => pairs.push((FLUSH_FAILED, since.to_string())),
        Some(Record::Departing { to, .. }) => pairs.push(("moving_to", to.to_string())),
        Some(Record::Incoming { .. } | Record::Ours(_)) | None => {}
    }
    pairs.extend(disk_id.map(|id| (DISK_ID, id.to_string())));
    status::line(&pairs)
}

fn describe_open_error(error: OpenError) -> String {
    match error {
        // The text of the error suggests `--create`, which `status` does not have.
        OpenError::Missing { path } => format!("{} does not exist", path.display()),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::{Id, RemoteAddress};

    #[test]
    fn each_record_has_its_pairs_without_spaces() {
        let (id, to) = (Id([7; 16]), RemoteAddress::new("192.0.2.7:10809").unwrap());
        let line =
            |record: Option<Record>| status_line(Path::new("/a disk"), 512, record.as_ref(), None);
        let start = "image=/a%20disk size=512 ownership=";
        assert_eq!(line(None), format!("{start}none"));
        assert_eq!(line(Some(Record::Incoming { id: None })), format!("{start}incoming"));
        assert_eq!(line(Some(Record::Ours(Provenance::Adopted))), format!("{start}ours"));
        let departing =
            Record::Departing { id, before: Provenance::Native, to: to.clone(), from: None };
        let expected = format!("{start}departing moving_to=192.0.2.7:10809");
        assert_eq!(line(Some(departing)), expected);
        let departed = Record::Departed { id, when: 1_700_000_000, to };
        let expected = format!("{start}departed moved_to=192.0.2.7:10809 moved_at=1700000000");
        assert_eq!(line(Some(departed)), expected);
        let with_id = status_line(Path::new("/a disk"), 512, None, Some(DiskId([0xab; 16])));
        assert_eq!(with_id, format!("{start}none disk_id={}", "ab".repeat(16)));
    }
}
