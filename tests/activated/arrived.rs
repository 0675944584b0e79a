//! A service that is to receive a disk that is there already.

use crate::manager::{Handed, Manager};
use harness::{MIB, sparse_image};

#[test]
fn it_was_ready_before_it_ended_so_that_the_service_manager_takes_it_for_a_success() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let id = "0123456789abcdef0123456789abcdef";
    let record = format!("flexnbd 1 ours title={id}\n");
    if xattr::set(&image, "user.flexnbd", record.as_bytes()).is_err() {
        // Where that cannot be, records are files.
        let name = image.display().to_string().replace('/', "%2F");
        std::fs::write(manager.path(&name), record).unwrap();
    }
    let mut service = manager.start(Handed::NbdAndControl, "listen --file", &[&image]);
    manager.wait_for("READY=1");
    assert_eq!(service.ends().code(), Some(0));
    assert!(service.stderr().contains("has arrived already"), "{}", service.stderr());
}
