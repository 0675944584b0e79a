//! Servers between runs: each is started anew, but for one that takes a second to start.
//! That one is kept, and because every session of it is a process of its own, the next run meets
//! nothing of the last one.

use super::Trouble;
use super::grid::Transport;
use super::running::Running;
use super::servers::Server;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Servers that go on.
#[derive(Debug, Default)]
pub(super) struct Kept {
    servers: Vec<(Key, Rc<Running>)>,
}

/// What a server has been started for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    name: String,
    image: PathBuf,
    transport: Transport,
}

impl Kept {
    /// A server that is ready: a new one, unless this one is kept and runs already.
    ///
    /// # Errors
    /// As [`Running::start`].
    pub(super) fn start(
        &mut self,
        server: &Server,
        image: &Path,
        transport: Transport,
    ) -> Result<Rc<Running>, Trouble> {
        let key = Key { name: server.name.clone(), image: image.to_owned(), transport };
        if let Some((_, running)) = self.servers.iter().find(|(other, _)| *other == key) {
            return Ok(Rc::clone(running));
        }
        let running = Rc::new(Running::start(server, image, transport)?);
        if server.forks_for_each_session() {
            self.servers.push((key, Rc::clone(&running)));
        }
        Ok(running)
    }

    /// Lets go of a server that did not do what it should.
    pub(super) fn forget(&mut self, running: &Rc<Running>) {
        self.servers.retain(|(_, kept)| !Rc::ptr_eq(kept, running));
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::servers;
    use super::*;

    #[test]
    fn only_what_forks_for_each_session_is_kept_until_it_is_forgotten() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let names = ["flexnbd", "nbd-server"].map(str::to_owned);
        for server in servers::installed(&names, &[]).unwrap() {
            let mut kept = Kept::default();
            let mut start =
                |kept: &mut Kept| kept.start(&server, image.path(), Transport::Unix).unwrap();
            let first = start(&mut kept);
            let pid = first.pid;
            kept.forget(&first);
            drop(first);
            let second = start(&mut kept);
            assert_ne!(second.pid, pid, "{}", server.name);
            let pid = second.pid;
            drop(second);
            let is_same = start(&mut kept).pid == pid;
            assert_eq!(is_same, server.forks_for_each_session(), "{}", server.name);
        }
    }
}
