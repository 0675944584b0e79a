//! Runs the tour in README.md and compares its output. Blocks marked `sh tour` are the script; a
//! following block marked `text` is the expected output, in which `...` matches any text.

use super::every_page::units;
use super::generator::generate;
use super::{assert_valid, read};
use harness::{flexnbd, free_port, project_path, require_tool, require_tools};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Time limit of the tour, which takes about two seconds.
const DEADLINE: Duration = Duration::from_secs(120);
/// The port in the README, which the test replaces by a free one.
const PORT: &str = "10809";
/// The line before the output of each step.
const MARK: &str = "== next step ==";

/// The fenced blocks: info string and content.
fn blocks(markdown: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut is_open = false;
    for line in markdown.lines() {
        match line.strip_prefix("```") {
            Some(_) if is_open => is_open = false,
            Some(kind) => {
                is_open = true;
                found.push((kind.to_owned(), String::new()));
            }
            None if is_open => {
                let (_, text) = found.last_mut().unwrap();
                text.push_str(line);
                text.push('\n');
            }
            None => {}
        }
    }
    assert!(!is_open, "a block is not closed");
    found
}

/// A script and its expected output.
struct Step {
    shell: String,
    shown: String,
}

fn tour(port: u16) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (kind, text) in blocks(&read("README.md")) {
        let text = text.replace(PORT, &port.to_string());
        match kind.as_str() {
            "sh tour" => steps.push(Step { shell: text, shown: String::new() }),
            "text" => steps.last_mut().unwrap().shown.push_str(&text),
            _ => {}
        }
    }
    assert!(steps.len() > 5, "only {} steps found", steps.len());
    steps
}

/// Kills the script's process group, also after a failure.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = killpg(self.0, Signal::SIGKILL);
    }
}

/// Runs a script; returns its exit status (`None` after [`DEADLINE`]) and its output.
fn run(script: &str, directory: &Path) -> (Option<ExitStatus>, String) {
    let output = directory.join("output of the tour");
    let file = File::create(&output).unwrap();
    let program = flexnbd();
    let program = program.parent().unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = [program.to_owned()].into_iter().chain(std::env::split_paths(&path));
    let work = directory.join("work");
    std::fs::create_dir(&work).unwrap();
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script]).current_dir(work);
    command.env("PATH", std::env::join_paths(path).unwrap()).env("LC_ALL", "C.UTF-8");
    command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).process_group(0);
    let child = command.spawn().unwrap();
    // Process ids fit into i32.
    let _group = Group(Pid::from_raw(child.id() as i32));
    let status = wait(child);
    (status, std::fs::read_to_string(output).unwrap())
}

fn wait(mut child: Child) -> Option<ExitStatus> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait().unwrap()));
    receiver.recv_timeout(DEADLINE).ok()
}

/// Whether a line matches the expected one. Any white space matches any other.
fn is_as_shown(line: &str, shown: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (line, shown) = (plain(line), plain(shown));
    let mut parts = shown.split("...");
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

#[test]
fn dots_match_any_text() {
    for (line, shown) in
        [("a", "a"), ("a  b", "a\tb"), ("pid=12 size=3", "pid=... size=3"), ("xyz", "...")]
    {
        assert!(is_as_shown(line, shown), "{line} as {shown}");
    }
    for (line, shown) in
        [("ab", "a"), ("ba", "a"), ("pid=12 size=3", "pid=... size=4"), ("abc", "a...d")]
    {
        assert!(!is_as_shown(line, shown), "{line} as {shown}");
    }
}

#[test]
fn the_tour_prints_the_documented_output() {
    if !require_tools(&["bash", "nbdinfo", "nbdcopy", "qemu-img"]) {
        return;
    }
    let steps = tour(free_port());
    let script: String =
        steps.iter().map(|step| format!("echo '{MARK}'\n{}", step.shell)).collect();
    let directory = tempfile::tempdir().unwrap();
    let (status, output) = run(&script, directory.path());
    let label = "output of the tour";
    let status = status.unwrap_or_else(|| panic!("timeout of {DEADLINE:?}; {label}:\n{output}"));
    assert!(status.success(), "the tour exited with {status}; {label}:\n{output}");
    for (step, printed) in steps.iter().zip(output.split(MARK).skip(1)) {
        let mut lines = printed.lines();
        for shown in step.shown.lines().filter(|line| *line != "...") {
            let found = lines.any(|line| is_as_shown(line, shown));
            assert!(found, "`{shown}` is not printed by\n{}\n{label}:\n{output}", step.shell);
        }
    }
}

#[test]
fn the_serve_command_is_valid() {
    let readme = read("README.md");
    let line = readme.lines().find_map(|line| line.strip_prefix("cargo run --release -- serve"));
    assert_valid(&format!("flexnbd serve{}", line.unwrap()));
}

/// The section "As a service".
fn service_section() -> String {
    let readme = read("README.md");
    let section = readme.split("\n## As a service\n").nth(1).unwrap();
    section.split("\n## ").next().unwrap().to_owned()
}

/// The configuration in the section "As a service".
fn four_lines() -> String {
    let mut found = blocks(&service_section());
    found.retain(|(kind, _)| kind == "conf");
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0).1
}

#[test]
fn the_four_lines_configure_a_service() {
    let text = four_lines();
    assert_eq!(text.lines().count(), 4, "{text}");
    let generated = generate(&text);
    assert_eq!(generated.errors, "");
    assert!(generated.settings().contains(&"ListenStream=[::]:10809"), "{generated:?}");
    let manual = read("man/flexnbd.service.7");
    assert!(manual.contains(&text), "the lines in the manual differ");
}

#[test]
fn serve_accepts_the_four_lines() {
    if !require_tool("bash") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let text = four_lines().replace("/var/lib/flexnbd", directory.path().to_str().unwrap());
    let port = free_port().to_string();
    let text = text.replace(PORT, &port) + "SOCK=control\n";
    std::fs::write(directory.path().join("disk.conf"), text).unwrap();
    let script = format!(
        "flexnbd serve --config ../disk.conf &
        server=$!
        until [ -S control ]; do sleep 0.1; done
        flexnbd status --config ../disk.conf
        flexnbd read --addr ::1 --port {port} --from 10G --size 1 || echo end of the disk
        kill $server
        wait $server && echo ended well"
    );
    let (status, output) = run(&script, directory.path());
    assert!(status.is_some_and(|status| status.success()), "{output}");
    for line in ["size=10737418240 ownership=none", "end of the disk", "ended well"] {
        assert!(output.contains(line), "no `{line}` in:\n{output}");
    }
}

#[test]
fn service_commands_are_valid_and_units_exist() {
    let section = service_section();
    let found = blocks(&section);
    let lines: Vec<&str> = found.iter().flat_map(|(_, text)| text.lines()).collect();
    let commands = lines.iter().filter_map(|line| line.split('#').next());
    let ours: Vec<&str> =
        commands.map(str::trim).filter(|line| line.starts_with("flexnbd ")).collect();
    assert!(ours.len() >= 2, "only {ours:?} found");
    ours.into_iter().for_each(assert_valid);
    let mentioned = units(&section);
    assert!(mentioned.len() >= 3, "only {mentioned:?} found");
    for unit in mentioned {
        assert!(project_path("systemd").join(&unit).is_file(), "{unit} does not exist");
    }
}

#[test]
fn linked_files_exist() {
    let readme = read("README.md");
    let targets = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let is_file = |target: &&str| !target.contains("://") && !target.starts_with('#');
    let files: Vec<&str> = targets.filter(is_file).collect();
    assert!(files.len() >= 3, "only {files:?} found");
    for file in files {
        assert!(project_path(file).exists(), "{file} does not exist");
    }
}

#[test]
fn the_required_rust_version_is_documented() {
    let needed = format!("Rust {} or later", env!("CARGO_PKG_RUST_VERSION"));
    assert!(read("README.md").contains(&needed), "the README does not say `{needed}`");
}

#[test]
fn commands_have_no_trailing_comments() {
    // An interactive zsh passes the comment as arguments.
    let readme = read("README.md");
    let mut is_shell = false;
    for line in readme.lines() {
        if let Some(kind) = line.strip_prefix("```") {
            is_shell = kind.starts_with("sh");
        } else if is_shell {
            assert!(
                !line.starts_with('#') && !line.contains(" #") || line.starts_with("# Keys"),
                "{line}"
            );
        }
    }
}
