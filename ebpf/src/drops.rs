//! The drop list, generated from `bpf/drops.h`: each reason's number, name and sentence.

include!(concat!(env!("OUT_DIR"), "/drops.rs"));

impl Drop {
    /// The counter's name, as in `status --json` and metrics.
    pub fn name(self) -> &'static str {
        ALL[self as usize].1
    }

    /// One sentence for the operator.
    pub fn sentence(self) -> &'static str {
        ALL[self as usize].2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What operators read is the list, row by row.
    #[test]
    fn the_manual_has_every_reason_and_no_other() {
        let manual = include_str!("../../docs/operations.md");
        let (_, section) = manual.split_once("\n## Drops\n").expect("the section");
        let (table, _) = section.trim_start().split_once("\n\n").expect("an end");
        let rows: Vec<_> = table.lines().skip(2).map(str::to_owned).collect();
        let list: Vec<_> =
            ALL.iter().map(|(_, name, sentence)| format!("| `{name}` | {sentence} |")).collect();
        assert_eq!(rows, list);
    }
}
