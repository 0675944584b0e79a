//! fio with its NBD engine: verified random writes over four connections.

use harness::{Program, for_each_transport_and_style, require_tool, wait_until};

#[test]
fn fio_verifies_writes_of_four_connections() {
    if !require_tool("fio") {
        return;
    }
    for_each_transport_and_style(|served, _| {
        let fio = Program::new("fio").words(
            "--name=verify --ioengine=nbd --rw=randwrite --bsrange=512-64k --bs_unaligned=0 \
             --size=12m --offset_increment=16m --numjobs=4 --iodepth=16 --verify=crc32c \
             --verify_fatal=1 --verify_state_save=0 --randseed=7 --group_reporting --output-format=json",
        );
        let uri = format!("--uri={}", served.uri());
        let text = fio.args([uri]).ok();
        // Messages may precede the report.
        let report: serde_json::Value =
            serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "errors");
        let bytes = |direction: &str| job[direction]["io_bytes"].as_u64().unwrap();
        assert_eq!(bytes("write"), 4 * (12 << 20), "bytes written");
        assert_eq!(bytes("read"), bytes("write"), "bytes verified");
        wait_until("the sessions to end", || served.server.resources().threads < 8);
        assert_eq!(served.server.stderr(), "");
    });
}
