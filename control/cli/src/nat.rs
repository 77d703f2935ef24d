//! What a NAT does, in a line.

use millrace_config::paths::NatKind;

/// Like `easy (the same mapping for all destinations), filters by address and port, keeps the port`.
/// `why_not`: why it is not known what is filtered.
pub(crate) fn text(kind: &NatKind, why_not: Option<&str>) -> String {
    let mapping = match kind.mapping.as_deref() {
        Some("none") => "none (no translation)",
        Some("endpoint_independent") => "easy (the same mapping for all destinations)",
        Some("address_dependent") => "hard (another mapping for each address)",
        Some("address_and_port_dependent") => "hard (another mapping for each address and port)",
        Some(_) => "hard (the mapping varies by destination)",
        None => "not known: no STUN servers at two addresses answered over IPv4",
    };
    let mut text = format!("{mapping}, {}", filtering(kind.filtering.as_deref()));
    if let (None, Some(why_not)) = (&kind.filtering, why_not) {
        text += &format!(" ({why_not})");
    }
    // Where nothing is translated there is nothing to say of ports.
    if let Some(preserved) = kind.port_preserved.filter(|_| kind.mapping.as_deref() != Some("none"))
    {
        text += if preserved { ", keeps the port" } else { ", changes the port" };
    }
    if let Some(ipv6) = &kind.filtering_ipv6 {
        text += &format!("; IPv6: {}", filtering(Some(ipv6)));
    }
    text
}

fn filtering(word: Option<&str>) -> &'static str {
    match word {
        Some("endpoint_independent") => "lets everybody in",
        Some("address_dependent") => "filters by address",
        Some("address_and_port_dependent") => "filters by address and port",
        Some(_) => "filters",
        None => "what it filters is not known",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_and_what_is_not() {
        let word = |word: &str| Some(word.to_owned());
        let mut kind = NatKind::default();
        assert_eq!(
            text(&kind, Some("no STUN server answers")),
            "not known: no STUN servers at two addresses answered over IPv4, what it filters is \
             not known (no STUN server answers)"
        );
        kind.mapping = word("endpoint_independent");
        kind.filtering = word("address_and_port_dependent");
        kind.port_preserved = Some(true);
        assert_eq!(
            text(&kind, Some("unused")),
            "easy (the same mapping for all destinations), filters by address and port, keeps the \
             port"
        );
        kind.mapping = word("none");
        kind.filtering = word("endpoint_independent");
        kind.filtering_ipv6 = word("address_dependent");
        assert_eq!(
            text(&kind, None),
            "none (no translation), lets everybody in; IPv6: filters by address"
        );
    }
}
