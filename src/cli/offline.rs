//! `flexnbd status --file`: what is known of a disk without asking the server that may have it.
//! Reads the image's size and record, locks nothing and changes nothing.

use super::operate;
use super::output;
use super::settings::Settings;
use super::start::{StartRequest, StartRequestError};
use crate::control::status::{self, OWNERSHIP};
use crate::daemon::ProcessRole;
use crate::disk::ownership::Record;
use crate::disk::record_store::{RecordStore, RecordStoreError, read_tombstone};
use crate::disk::{OpenError, image_size};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Which disk to look at, and how to tell of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfflineStatus {
    /// Where the image is found.
    pub disk: DiskArgument,
    /// As JSON.
    pub json: bool,
}

/// Which disk is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskArgument {
    /// This image.
    File(PathBuf),
    /// The one of this configuration file.
    Config(PathBuf),
}

/// Tells what there is to know.
#[must_use]
pub fn run(offline: &OfflineStatus) -> ExitCode {
    match offline.told() {
        Ok(line) => output::say(&line),
        Err(why) => output::complain(&format!("flexnbd status: {why}"), output::EXIT_FAILURE),
    }
}

impl OfflineStatus {
    fn told(&self) -> Result<String, String> {
        let image = self.disk.image()?;
        let said = |error: RecordStoreError| error.to_string();
        let (size, record) = match image_size(&image) {
            Ok(size) => {
                (size, RecordStore::at(&image).and_then(|ledger| ledger.peek()).map_err(said)?)
            }
            Err(error) => {
                let last = read_tombstone(&image).map_err(said)?;
                (0, Some(last.ok_or_else(|| unfit(error))?))
            }
        };
        let line = describe(&image, size, record.as_ref());
        operate::as_asked(&line, self.json)
    }
}

impl DiskArgument {
    fn image(&self) -> Result<PathBuf, String> {
        let path = match self {
            Self::File(image) => return Ok(image.clone()),
            Self::Config(path) => path,
        };
        // All that keeps a server from starting with it is wrong here as well, so that a
        // configuration can be tried before a restart.
        let config = Some(path.clone());
        let start =
            StartRequest { role: ProcessRole::Serve, settings: Settings::default(), config };
        match start.plan() {
            Ok(plan) => Ok(plan.image),
            Err(StartRequestError::Misuse(why) | StartRequestError::Config(why)) => Err(why),
        }
    }
}

/// The pairs that hold for every record, then those of some.
fn describe(image: &Path, size: u64, record: Option<&Record>) -> String {
    let mut pairs = vec![
        ("image", image.display().to_string()),
        ("size", size.to_string()),
        (OWNERSHIP, record.map_or("none", Record::name).to_owned()),
    ];
    match record {
        Some(Record::Departed { when, to, .. }) => {
            pairs.extend([("moved_to", to.to_string()), ("moved_at", when.to_string())]);
        }
        Some(Record::Departing { to, .. }) => pairs.push(("moving_to", to.to_string())),
        Some(Record::Incoming { .. } | Record::Ours(_)) | None => {}
    }
    status::line(&pairs)
}

fn unfit(error: OpenError) -> String {
    match error {
        // To make it is no advice for somebody who only looks.
        OpenError::Missing { path } => format!("{} does not exist", path.display()),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::{Id, Provenance, RemoteAddress};

    #[test]
    fn each_record_has_its_pairs_and_no_value_a_space() {
        let (id, to) = (Id([7; 16]), RemoteAddress::new("192.0.2.7:10809").unwrap());
        let told = |record: Option<Record>| describe(Path::new("/a disk"), 512, record.as_ref());
        let start = "image=/a%20disk size=512 ownership=";
        assert_eq!(told(None), format!("{start}none"));
        assert_eq!(told(Some(Record::Incoming { id: None })), format!("{start}incoming"));
        assert_eq!(told(Some(Record::Ours(Provenance::Adopted))), format!("{start}ours"));
        let departing =
            Record::Departing { id, before: Provenance::Native, to: to.clone(), from: None };
        let expected = format!("{start}departing moving_to=192.0.2.7:10809");
        assert_eq!(told(Some(departing)), expected);
        let departed = Record::Departed { id, when: 1_700_000_000, to };
        let expected = format!("{start}departed moved_to=192.0.2.7:10809 moved_at=1700000000");
        assert_eq!(told(Some(departed)), expected);
    }
}
