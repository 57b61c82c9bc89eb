//! The documentation, enforced: sentences stay short, the device of ARCHITECTURE.md is the one that runs, files it names are there.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's")]

use std::fs;
use std::path::{Path, PathBuf};

/// Words of a sentence, and of the first one of a public item or a file.
const MAX_WORDS: usize = 25;
const MAX_FIRST_WORDS: usize = 15;

/// Pages for people who use or change the crate.
const PAGES: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benches/README.md",
    "docs/guide.md",
    "lab/README.md",
];

/// Words that leave the party or the mechanism unnamed. No documentation has them.
const PRIVATE_WORDS: &[&str] = &[
    "nobody",
    "everybody",
    "somebody",
    "whoever",
    "told",
    "untold",
    "hears",
    "heard",
    "patience",
    "under way",
    "begun anew",
    "comes to rest",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files of the library, beneath `src`.
fn sources() -> Vec<PathBuf> {
    let (mut found, mut directories) = (Vec::new(), vec![root().join("src")]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => directories.push(path),
                Some(extension) if extension == "rs" => found.push(path),
                _ => {}
            }
        }
    }
    assert!(found.len() > 40, "the sources were not found");
    found
}

/// The text of a line of documentation, without its mark.
fn documentation(line: &str) -> Option<&str> {
    let line = line.trim_start();
    // Code that is compiled only with a feature begins so; a second line says what it is without.
    if line.contains("doc = \"```no_run\"") {
        return Some("```");
    }
    line.strip_prefix("///").or_else(|| line.strip_prefix("//!"))
}

/// The paragraphs of Markdown, each with its line, without code, headings and tables.
fn paragraphs<'a>(lines: impl Iterator<Item = (usize, Option<&'a str>)>) -> Vec<(usize, String)> {
    let (mut all, mut now, mut fenced) = (Vec::new(), None::<(usize, String)>, false);
    for (number, line) in lines {
        let text = line.unwrap_or_default().trim();
        let item = text.starts_with("- ") || text.split_once(". ").is_some_and(|(n, _)| n.parse::<u32>().is_ok());
        let fence = text.starts_with("```");
        let code = fenced || line.is_some_and(|line| line.starts_with("     ") && now.is_none());
        if text.is_empty() || fence || item || code || text.starts_with('#') || text.starts_with('|') {
            all.extend(now.take());
        }
        fenced ^= fence;
        if text.is_empty() || fence || code || text.starts_with('#') || text.starts_with('|') {
            continue;
        }
        let (_, paragraph) = now.get_or_insert((number, String::new()));
        paragraph.push(' ');
        paragraph.push_str(text.trim_start_matches("- "));
    }
    all.extend(now);
    all
}

/// Code and link targets count as one word, or none.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    for (n, piece) in text.split('`').enumerate() {
        plain.push_str(if n % 2 == 0 { piece } else { "Code" });
    }
    while let Some(at) = plain.find("](") {
        let end = plain[at..].find(')').map_or(plain.len(), |end| at + end + 1);
        plain.replace_range(at..end, "]");
    }
    plain
}

fn sentences(paragraph: &str) -> Vec<String> {
    let text = plain(paragraph);
    let (mut all, mut now) = (Vec::new(), Vec::new());
    let words: Vec<&str> = text.split_whitespace().collect();
    for (n, word) in words.iter().enumerate() {
        now.push(*word);
        let bare = word.trim_end_matches(['"', ')', ']', '*']);
        let next = words.get(n + 1).and_then(|next| next.trim_start_matches(['[', '"', '(', '*']).chars().next());
        let ends = bare.ends_with(['.', '!', '?']) && next.is_none_or(|c| c.is_uppercase() || c.is_ascii_digit());
        if ends || n + 1 == words.len() {
            all.push(now.join(" "));
            now.clear();
        }
    }
    all
}

fn words(sentence: &str) -> usize {
    sentence.split_whitespace().filter(|word| word.contains(char::is_alphanumeric)).count()
}

fn check(path: &Path, paragraphs: Vec<(usize, String)>, problems: &mut Vec<String>) {
    for (number, paragraph) in paragraphs {
        for sentence in sentences(&paragraph).iter().filter(|sentence| words(sentence) > MAX_WORDS) {
            problems.push(format!("{}:{}: {} words: {sentence}", path.display(), number + 1, words(sentence)));
        }
    }
}

/// The private words that begin on each line, with its number. A phrase may end on the next line.
fn private_words(lines: &[Option<&str>]) -> Vec<(usize, &'static str)> {
    let separate = |line: Option<&str>| {
        let text = plain(line.unwrap_or_default()).to_lowercase();
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
        words.fold(String::from(" "), |all, word| all + word + " ")
    };
    let mut found = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let own = separate(*line);
        let text = format!("{own}{}", separate(lines.get(number + 1).copied().flatten()).trim_start());
        let begins = |word: &&&str| text.find(&format!(" {word} ")).is_some_and(|at| at + 1 < own.len());
        found.extend(PRIVATE_WORDS.iter().filter(begins).map(|word| (number, *word)));
    }
    found
}

/// The first sentences of files and of public items, with their lines.
fn first_sentences(text: &str) -> Vec<(usize, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut all = Vec::new();
    for (begin, line) in lines.iter().enumerate() {
        let block = line.trim_start().starts_with("///")
            && begin
                .checked_sub(1)
                .is_none_or(|before| documentation(lines[before]).is_none() && !lines[before].contains("doc = "));
        let end = begin + lines[begin..].iter().take_while(|line| documentation(line).is_some()).count();
        let item = lines[end..].iter().find(|line| !line.trim_start().starts_with(['#', '/']));
        let public = item.is_some_and(|item| item.trim_start().starts_with("pub "));
        if begin == 0 || block && public {
            let paragraphs = paragraphs(lines[begin..end].iter().map(|line| documentation(line)).enumerate());
            let first = paragraphs.first().and_then(|(_, text)| sentences(text).into_iter().next());
            all.extend(first.map(|first| (begin, first)));
        }
    }
    all
}

#[test]
fn first_sentences_have_at_most_15_words() {
    let (mut problems, mut count) = (Vec::new(), 0);
    for path in sources() {
        for (number, first) in first_sentences(&fs::read_to_string(&path).unwrap()) {
            count += 1;
            if words(&first) > MAX_FIRST_WORDS {
                problems.push(format!("{}:{}: {} words: {first}", path.display(), number + 1, words(&first)));
            }
        }
    }
    assert!(problems.is_empty(), "shorten these:\n{}", problems.join("\n"));
    assert!(count > 500, "{count} were found");
}

#[test]
fn sentences_have_at_most_25_words() {
    let mut problems = Vec::new();
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        check(&path, paragraphs(text.lines().map(documentation).enumerate()), &mut problems);
    }
    for page in PAGES {
        let text = fs::read_to_string(root().join(page)).unwrap();
        check(Path::new(page), paragraphs(text.lines().map(Some).enumerate()), &mut problems);
    }
    assert!(problems.is_empty(), "split these:\n{}", problems.join("\n"));
}

#[test]
fn a_long_sentence_is_found() {
    let long = format!("It is {} and ends here. Another.", "very ".repeat(25));
    let found = paragraphs(long.lines().map(Some).enumerate());
    let mut problems = Vec::new();
    check(Path::new("page"), found, &mut problems);
    assert_eq!(problems.len(), 1, "{problems:?}");
    let code = format!("```text\n{long}\n```\n\n| {long} |");
    assert!(paragraphs(code.lines().map(Some).enumerate()).is_empty());
    assert_eq!(sentences("See [`Vm`](crate::Vm. Or x). `a.b` is one. Two (Virtio 1.3, 5.2.6): yes.").len(), 3);
}

#[test]
fn no_private_words_in_documentation() {
    let mut problems = Vec::new();
    let mut look = |path: &Path, lines: Vec<Option<&str>>| {
        let found = private_words(&lines);
        problems.extend(found.iter().map(|(number, word)| format!("{}:{}: {word}", path.display(), number + 1)));
    };
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        look(&path, text.lines().map(documentation).collect());
    }
    for page in PAGES {
        let text = fs::read_to_string(root().join(page)).unwrap();
        look(Path::new(page), text.lines().map(Some).collect());
    }
    assert!(problems.is_empty(), "name the party or the mechanism:\n{}", problems.join("\n"));
}

#[test]
fn a_private_word_is_found() {
    let text = "/// Nobody's, and it is under\n/// way. `heard`, foretold, told_closed.\nlet told = 1; // told";
    let lines: Vec<_> = text.lines().map(documentation).collect();
    assert_eq!(private_words(&lines), [(0, "nobody"), (0, "under way")]);
    assert_eq!(private_words(&[Some("It is"), Some("told.")]), [(1, "told")]);
}

#[test]
fn the_device_of_the_architecture_is_the_one_that_runs() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let device = fs::read_to_string(root().join("src/virtio/example.rs")).unwrap();
    assert!(page.contains(&format!("```rust\n{device}```")), "copy src/virtio/example.rs into ARCHITECTURE.md");
    assert!(device.lines().count() <= 40, "the example is to be short");
}

#[test]
fn files_that_the_pages_name_are_there() {
    for page in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root().join(page)).unwrap();
        let code = text.split('`').skip(1).step_by(2);
        let named = code.filter(|name| name.ends_with(".rs") && !name.contains(['*', '{', ' ']));
        let mut count = 0;
        for name in named {
            let there = sources().iter().any(|path| path.ends_with(name)) || root().join(name).exists();
            assert!(there, "{page} names {name}, which is not there");
            count += 1;
        }
        assert!(count > 3, "{page} names no files");
    }
}
