//! `listen` for a disk that has arrived already.

use harness::manager::{Inherited, ServiceManager};
use harness::{MIB, sparse_image};

#[test]
fn listen_reports_readiness_before_it_exits() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let id = "0123456789abcdef0123456789abcdef";
    let record = format!("flexnbd 1 ours title={id}\n");
    if xattr::set(&image, "user.flexnbd", record.as_bytes()).is_err() {
        // File systems without extended attributes keep the record in a file.
        let name = image.display().to_string().replace('/', "%2F");
        std::fs::write(manager.path(&name), record).unwrap();
    }
    let mut service = manager.start(Inherited::NbdAndControl, "listen --file", &[&image]);
    manager.wait_for("READY=1");
    assert_eq!(service.wait_for_exit().code(), Some(0));
    assert!(service.stderr().contains("has arrived already"), "{}", service.stderr());
}
