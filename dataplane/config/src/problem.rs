//! What is wrong with a configuration: where, what was seen, what was expected, what to do.

use std::fmt;

use crate::limits;

/// One defect of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, both from 1; none when the defect is of the file as a whole.
    pub position: Option<(usize, usize)>,
    /// The key as an operator would write it: `interface.mtu`, `peer[2].endpoint`.
    pub key: String,
    pub seen: String,
    pub expected: String,
    pub cure: String,
}

/// All defects of one file, in the order of their positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.position {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}; expected {}; {}", self.seen, self.expected, self.cure)
    }
}

impl Problems {
    /// In order of position, and no more than an operator wants to read.
    pub fn new(mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| problem.position);
        problems.truncate(limits::PROBLEMS_MAX);
        Self(problems)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Line and column, from 1, of a byte offset. The column counts characters.
pub fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    (line, String::from_utf8_lossy(&before[start..]).chars().count() + 1)
}

/// The known word nearest to `word`, if it is near enough to be a slip of the fingers.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|&(distance, candidate)| distance <= candidate.len().div_ceil(3).min(4))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Text from a file as it may be shown: short and without control characters.
pub fn quoted(text: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        assert_eq!(position("", 0), (1, 1));
        assert_eq!(position("ab\ncd", 4), (2, 2));
        assert_eq!(position("é=1", 3), (1, 3));
        assert_eq!(position("x", 99), (1, 2));
    }

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let known = ["listen_port", "mtu", "address"];
        assert_eq!(nearest("listen-port", known.into_iter()), Some("listen_port"));
        assert_eq!(nearest("mtuu", known.into_iter()), Some("mtu"));
        assert_eq!(nearest("stun", known.into_iter()), None);
    }
}
