//! Offsets and sizes of every shared struct, and the numbers of every shared enum, are those in
//! the object's BTF. Read through libbpf, which is not the loader that we ship. Needs root.

use std::mem::offset_of;

use libbpf_rs::btf::types::{Enum, MemberAttr, Struct};
use libbpf_rs::btf::{Btf, BtfType, HasSize as _};
use millrace_ebpf::abi::{Abi, DropCount, Endpoint, EndpointKind, Flags, Observed, Session, Stats};
use millrace_ebpf::class::Class;
use millrace_ebpf::drops;

const PROGRAMS: &str = concat!(env!("OUT_DIR"), "/programs.bpf.o");
const TWIN: &str = concat!(env!("OUT_DIR"), "/twin.bpf.o");

/// Name, byte offset, byte size of each field.
type Fields = Vec<(String, usize, usize)>;

macro_rules! fields {
    ($type:ident { $($field:ident),+ $(,)? }) => {{
        // Without `..`: a field that is missing in the list is an error.
        let $type { $($field),+ } = $type::default();
        let fields: Fields = vec![
            $((stringify!($field).to_owned(), offset_of!($type, $field), size_of_val(&$field))),+
        ];
        (fields, size_of::<$type>())
    }};
}

fn c_fields(btf: &Btf<'_>, name: &str) -> (Fields, usize) {
    let c = btf.type_by_name::<Struct<'_>>(name).unwrap_or_else(|| panic!("struct {name} in BTF"));
    let fields = c
        .iter()
        .map(|member| {
            let MemberAttr::Normal { offset: bits } = member.attr else {
                panic!("{name}: bit fields have no twin")
            };
            let kind = btf.type_by_id::<BtfType<'_>>(member.ty).expect("member type");
            let name = member.name.expect("named").to_str().expect("UTF-8").to_owned();
            (name, bits as usize / 8, size_of_type(kind))
        })
        .collect();
    (fields, c.size())
}

fn size_of_type(kind: BtfType<'_>) -> usize {
    let kind = kind.skip_mods_and_typedefs();
    libbpf_rs::btf_type_match!(match kind {
        BtfKind::Array(array) => array.capacity() * size_of_type(array.contained_type()),
        BtfKind::Int(int) => usize::from(int.bits) / 8,
        _ => panic!("no rule for {kind:?}"),
    })
}

fn c_enum(btf: &Btf<'_>, name: &str) -> Vec<(String, i64)> {
    let c = btf.type_by_name::<Enum<'_>>(name).unwrap_or_else(|| panic!("enum {name} in BTF"));
    c.iter()
        .map(|member| {
            let name = member.name.expect("named").to_str().expect("UTF-8").to_owned();
            (name, member.value)
        })
        .collect()
}

#[test]
fn every_shared_struct_has_the_layout_that_the_object_has() {
    let btf = Btf::from_path(PROGRAMS).expect("the object has BTF");
    let pairs = [
        (
            "abi",
            fields!(Abi {
                magic,
                version,
                endpoint_size,
                observed_size,
                session_size,
                drop_size,
                stats_size,
                peers_max,
                sessions_max,
                workers_max,
                queues_max,
                drops_count,
            }),
        ),
        ("flags", fields!(Flags { authoritative, local_addresses })),
        (
            "endpoint",
            fields!(Endpoint {
                seq,
                kind,
                family,
                port,
                address,
                local,
                ifindex,
                path_mtu,
                prefix_length,
                reserved,
                prefix,
            }),
        ),
        (
            "observed",
            fields!(Observed {
                seq,
                family,
                kind,
                port,
                address,
                local,
                ifindex,
                reserved2,
                received_ns,
                sent_ns,
                handshake_ns,
                received_bytes,
                sent_bytes,
                unanswered_ns,
                reserved3,
            }),
        ),
        ("session", fields!(Session { index, live, peer_slot, worker })),
        ("drop_count", fields!(DropCount { packets, bytes })),
        (
            "stats",
            fields!(Stats {
                heartbeat_ns,
                received_packets,
                received_bytes,
                received_batches,
                sent_packets,
                sent_bytes,
                sent_batches,
                reserved,
                drops,
            }),
        ),
    ];
    for (name, rust) in pairs {
        assert_eq!(rust, c_fields(&btf, name), "struct {name}: Rust is left, C is right");
    }
}

#[test]
fn every_shared_enum_has_the_numbers_that_the_object_has() {
    let btf = Btf::from_path(TWIN).expect("the object has BTF");
    let mut drops: Vec<_> =
        drops::ALL.iter().map(|(drop, name, _)| (format!("DROP_{name}"), *drop as i64)).collect();
    drops.push(("DROPS_COUNT".to_owned(), drops::COUNT as i64));
    assert_eq!(drops, c_enum(&btf, "drop"));

    let classes = [
        ("CLASS_UNKNOWN", Class::Unknown),
        ("CLASS_WG_DATA", Class::WgData),
        ("CLASS_WG_HANDSHAKE", Class::WgHandshake),
        ("CLASS_STUN", Class::Stun),
        ("CLASS_DISCO", Class::Disco),
        ("CLASS_GENEVE", Class::Geneve),
    ];
    assert_eq!(
        classes.map(|(name, class)| (name.to_owned(), class as i64)),
        *c_enum(&btf, "class")
    );

    let kinds = [
        ("ENDPOINT_UNSET", EndpointKind::Unset),
        ("ENDPOINT_DIRECT", EndpointKind::Direct),
        ("ENDPOINT_PEER_RELAY", EndpointKind::PeerRelay),
        ("ENDPOINT_DETOUR", EndpointKind::Detour),
    ];
    let c = c_enum(&btf, "endpoint_kind");
    assert_eq!(kinds.map(|(name, kind)| (name.to_owned(), kind as i64)), *c);
}

#[test]
fn libbpf_loads_the_object_that_aya_loads() {
    let object = libbpf_rs::ObjectBuilder::default()
        .open_file(PROGRAMS)
        .expect("libbpf opens the object")
        .load()
        .expect("libbpf loads it; run the tests as root");
    let names: Vec<_> = object.progs().map(|program| program.name().to_owned()).collect();
    assert_eq!(names, ["millrace_xdp", "millrace_reuseport"]);
}
