//! The command as scripts use it: exit codes, what goes to which stream, and a real data plane.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod schema;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use millrace_lab::{Lab, Namespace};
use serde_json::Value;

const MILLRACE: &str = env!("CARGO_BIN_EXE_millrace");

fn run(words: &[&str]) -> Output {
    Command::new(MILLRACE).args(words).stdin(Stdio::null()).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

fn with_input(program: &str, words: &[&str], input: &str) -> Output {
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn every_command_has_help_on_standard_output() {
    for command in [
        "up", "down", "reload", "status", "genkey", "pubkey", "genpsk", "config", "version",
        "netcheck",
    ] {
        let output = run(&[command, "--help"]);
        assert_eq!(code(&output), 0, "{command}");
        assert!(text(&output.stdout).contains("Usage: millrace"), "{command}");
    }
    let codes = text(&run(&["exit-codes"]).stdout);
    assert!(codes.contains("7  the configuration is not valid"), "{codes}");
}

#[test]
fn a_wrong_command_line_is_exit_2_and_says_so_on_standard_error() {
    let output = run(&["statsu"]);
    assert_eq!((code(&output), text(&output.stdout).as_str()), (2, ""));
    assert!(text(&output.stderr).contains("status"), "it suggests the right word");
}

#[test]
fn keys_agree_with_wg() {
    let key = text(&run(&["genkey"]).stdout);
    assert_ne!(key, text(&run(&["genkey"]).stdout));
    let ours = with_input(MILLRACE, &["pubkey"], &key);
    let theirs = with_input("wg", &["pubkey"], &format!("{key}\n"));
    assert_eq!(code(&ours), 0);
    assert_eq!(text(&ours.stdout), text(&theirs.stdout));
    assert_eq!(text(&run(&["genpsk"]).stdout).len(), 44);
    let bad = with_input(MILLRACE, &["pubkey"], "no key");
    assert_eq!((code(&bad), text(&bad.stdout).as_str()), (1, ""));
}

#[test]
fn config_check_places_each_defect_and_is_exit_7() {
    let directory = tempfile::tempdir().unwrap();
    let good = directory.path().join("good.toml");
    fs::write(&good, "schema = 1\n[interface]\nname = \"mr0\"\n").unwrap();
    assert_eq!(code(&run(&["config", "check", good.to_str().unwrap()])), 0);

    let bad = directory.path().join("bad.toml");
    fs::write(&bad, "schema = 1\n[interface]\nnmae = \"mr0\"\nlisten_port = 99999\n").unwrap();
    let output = run(&["config", "check", bad.to_str().unwrap()]);
    assert_eq!(code(&output), 7);
    let said = text(&output.stderr);
    assert!(said.contains("line 3") && said.contains("name"), "{said}");
    assert!(said.contains("line 4") && said.contains("listen_port"), "{said}");

    let missing = directory.path().join("missing.toml");
    assert_eq!(code(&run(&["config", "check", missing.to_str().unwrap()])), 7);
}

#[test]
fn what_does_not_run_is_exit_5_and_says_how_to_start_it() {
    for command in ["status", "down", "reload"] {
        let output = run(&[command, "mr-nobody"]);
        assert_eq!(code(&output), 5, "{command}");
        assert!(text(&output.stderr).contains("millrace up"), "{command}");
    }
}

/// A configuration of a lab's own interface, with one peer that never answers.
fn configuration(lab: &Lab, name: &str) -> PathBuf {
    let key = lab.directory().join("key");
    fs::write(&key, run(&["genkey"]).stdout).unwrap();
    let peer = text(&with_input(MILLRACE, &["pubkey"], &text(&run(&["genkey"]).stdout)).stdout);
    let file = lab.directory().join("millrace.toml");
    let toml = format!(
        "schema = 1\n[interface]\nname = \"{name}\"\nprivate_key_file = \"{}\"\n\
         address = [\"10.99.0.1/24\"]\n[[peer]]\npublic_key = \"{peer}\"\n\
         allowed_ips = [\"10.98.0.0/16\"]\nendpoint = \"192.0.2.2:51820\"\n",
        key.display()
    );
    fs::write(&file, toml).unwrap();
    file
}

fn inside(namespace: &Namespace, words: &[&str]) -> Output {
    let mut command = namespace.command(MILLRACE);
    namespace.output(command.args(words), "").unwrap()
}

/// Ends a data plane that a failed test left behind.
struct Down<'a>(&'a Namespace, String);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        inside(self.0, &["down", &self.1]);
    }
}

#[test]
fn a_data_plane_goes_up_tells_reloads_and_goes_down() {
    let lab = Lab::new().unwrap();
    let namespace = lab.namespace("cli").unwrap();
    let name = lab.interface_name();
    let file = configuration(&lab, &name);
    let file = file.to_str().unwrap();

    assert_eq!(run_detached(&namespace, &["up", file]), 0);
    let _down = Down(&namespace, name.clone());
    assert_eq!(run_detached(&namespace, &["up", file]), 1, "it runs already");

    let output = inside(&namespace, &["status", &name, "--json"]);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema::check(&document, "millrace.status.1.json");
    assert_eq!(document["peers"][0]["has_session"], false);
    let table = text(&inside(&namespace, &["status", &name]).stdout);
    assert!(table.contains("192.0.2.2:51820"), "{table}");
    assert_eq!(code(&inside(&namespace, &["status", &name, "--check", "live"])), 0);
    assert_eq!(code(&inside(&namespace, &["status", &name, "--check", "ready"])), 4);

    assert_eq!(code(&inside(&namespace, &["reload", &name])), 0);
    assert_eq!(code(&inside(&namespace, &["down", &name])), 0);
    assert_eq!(code(&inside(&namespace, &["status", &name])), 5);
}

/// `up` leaves a daemon behind, which must not die with the thread that started it nor hold a pipe.
fn run_detached(namespace: &Namespace, words: &[&str]) -> i32 {
    let status = Command::new("nsenter")
        .arg(format!("--net={}", namespace.path()))
        .arg(MILLRACE)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.unwrap().code().unwrap()
}

#[test]
fn a_bad_file_does_not_go_up_and_quotes_the_defect() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bad.toml");
    fs::write(&file, "schema = 1\n[interface]\nname = \"mrbad\"\nprivate_key_file = \"/none\"\n")
        .unwrap();
    let output = run(&["up", file.to_str().unwrap()]);
    assert_eq!(code(&output), 7, "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("/none"));
    assert!(!Path::new("/run/millrace/mrbad.pid").exists());
}
