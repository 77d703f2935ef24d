//! The loader against the running kernel. Needs root.

use millrace_ebpf::load::{LoadOptions, Programs};

#[test]
fn programs_load_and_sessions_come_and_go() {
    let programs = Programs::load(LoadOptions::new(51820)).expect("load; run the tests as root");
    programs.sessions.insert(7, 3, 1).expect("insert");
    let session = programs.sessions.get(7).expect("get").expect("present");
    assert_eq!((session.peer_slot, session.worker), (3, 1));
    assert!(programs.sessions.remove(7).expect("remove"));
    assert!(!programs.sessions.remove(7).expect("remove"));
}
