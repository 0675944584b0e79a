//! Usage errors: one message and the usage line on stderr, exit status 2, nothing on stdout.

use harness::Program;

#[track_caller]
fn assert_usage_error(arguments: &str, part: &str) {
    let outcome = Program::flexnbd(arguments).run();
    outcome.refused(2, &[part]);
    let mode = arguments.split_whitespace().find(|word| !word.starts_with('-'));
    let mode = mode.filter(|mode| *mode != "frobnicate").map_or(String::new(), |m| format!(" {m}"));
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "one message and the usage: {lines:?}");
    assert!(lines[0].starts_with(&format!("flexnbd{mode}: ")), "{lines:?}");
    assert!(lines[1].starts_with(&format!("Usage: flexnbd{mode}")), "{lines:?}");
    assert_eq!(outcome.text(), "");
}

#[test]
fn every_usage_error_has_its_message() {
    let range = "--addr 127.0.0.1 --port 1 --from 0 --size 1";
    for (arguments, part) in [
        ("", "a mode is missing"),
        ("frobnicate", "unknown mode `frobnicate`"),
        ("serve", "--file FILE is missing"),
        ("serve --file a --port 1", "--port needs --addr"),
        ("serve --file a --addr 127.0.0.1", "needs --port"),
        ("serve --file a --addr nowhere --port 1", "nowhere"),
        ("serve --file a --addr /a --port 1", "has no port"),
        ("serve --file a --addr ::1 --port 65536", "`65536`"),
        ("serve --file a --frob", "unknown option `--frob`"),
        ("serve --file a --max-clients 0", "`0`"),
        ("serve --file a --create 1X", "1X"),
        ("serve --file a --addr ::1 --port 1 10.0.0.0/33", "serve: ACL_ENTRY: '10.0.0.0/33'"),
        ("serve --file", "--file FILE needs a value"),
        ("read", "--from OFFSET and --size SIZE are missing"),
        ("read --from 0 --size 1", "give --addr and --port, or --uri"),
        ("read --from 0 --size 1 --port 1", "--port needs --addr"),
        ("read --from 0 --size 0 --addr ::1 --port 1", "`0`"),
        ("read --from 0 --size 1025M --addr ::1 --port 1", "`1025M`"),
        ("read --from 4611686018427387905 --size 1 --addr ::1 --port 1", "4611686018427387905"),
        ("read --from x --size 1 --addr ::1 --port 1", "`x`"),
        ("read --from 0 --size 1 --uri nbd+vsock://localhost", "nbd+vsock"),
        ("read --from 0 --size 1 --uri http://localhost", "http"),
        ("read --from 0 --size 1 --uri nbd+unix:///", "socket"),
        ("read --from 0 --size 1 --uri nbd://localhost --port 1", "cannot go with"),
        ("read --from 0 --size 1 --uri nbd://localhost/a --export b", "contradicts"),
        ("read --from 0 --size 1 --addr /a --bind ::1", "--bind"),
        ("read --from 0 --size 1 --addr /a --bind nowhere", "`nowhere`"),
        ("write --from 0", "--size SIZE is missing"),
        ("write --from 0 --size 1 --addr ::1", "port"),
        ("acl", "--sock SOCK or --instance NAME"),
        ("acl --sock a", "an ACL_ENTRY is missing"),
        ("acl --sock a --instance b ::1", "cannot go with"),
        ("status", "--sock SOCK or --instance NAME"),
        ("status --sock a b", "`b` has no meaning here"),
        ("status --instance a/b", "`a/b`"),
        ("reload", "--sock SOCK or --instance NAME"),
        ("reload --sock a --json", "unknown option `--json`"),
        ("help frobnicate", "unknown mode `frobnicate`"),
    ] {
        assert_usage_error(arguments, part);
    }
    assert_usage_error(&format!("read {range} --size"), "--size SIZE needs a value");
}

#[test]
fn help_describes_every_mode_on_stdout() {
    let all = Program::flexnbd("help").ok();
    for mode in ["serve", "read", "write", "acl", "status", "reload", "help"] {
        assert!(all.contains(&format!("  {mode} ")), "no {mode} in: {all}");
        let one = Program::flexnbd(&format!("help {mode}")).ok();
        assert!(one.contains(&format!("Usage: flexnbd {mode}")), "{one}");
        assert_eq!(Program::flexnbd(&format!("{mode} --help")).ok(), one);
        assert_eq!(Program::flexnbd(&format!("{mode} -h")).ok(), one);
    }
    assert_eq!(Program::flexnbd("--help").ok(), all);
    let version = Program::flexnbd("--version").ok();
    assert_eq!(version, format!("flexnbd {}\n", env!("CARGO_PKG_VERSION")));
}
