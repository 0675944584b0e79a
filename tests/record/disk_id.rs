//! The id of a disk on a block device, which cannot have attributes.

use crate::renamed::LoopDevice;
use crate::{SIZE, image};
use harness::host::{Host, MIRROR_STARTED};
use harness::{require_root, sparse_image, temp_dir_in};

/// Several hosts may share a device, and each would draw another id for one disk.
#[test]
fn a_device_gets_no_id_of_its_own_and_keeps_one_that_comes() {
    if !require_root("a loop device") {
        return;
    }
    let directory = temp_dir_in("/var/tmp");
    let device = LoopDevice::of(&sparse_image(directory.path(), "device", SIZE));
    let (file, mut on_device) =
        (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    on_device.image = device.0.clone().into();
    image(&file, b"precious");
    let (mut empty, mut server) = (on_device.serve(), file.serve());
    let id = file.wait_for_disk_id();
    assert!(empty.stop().success());
    assert_eq!(on_device.disk_id(), "", "{}", empty.stderr());
    assert_eq!(std::fs::read_dir(on_device.state_directory()).unwrap().count(), 0);
    for (from, to) in [(&file, &on_device), (&on_device, &file)] {
        let mut listener = to.listen();
        assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
        assert!(server.wait_for_end().success(), "{}", server.stderr());
        assert!(listener.wait_for_end().success(), "{}", listener.stderr());
        server = to.serve();
        assert_eq!((to.status_of("disk_id"), from.disk_id()), (id.clone(), String::new()));
    }
}
