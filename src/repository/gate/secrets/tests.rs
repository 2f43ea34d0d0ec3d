use std::{collections::BTreeSet, time::Instant};

use super::*;

fn kinds(path: &str, content: &str) -> Vec<&'static str> {
    find(Path::new(path), content.as_bytes(), None)
        .iter()
        .map(|finding| finding.kind())
        .collect()
}

#[test]
fn every_rule_finds_its_form() {
    let mut missed = Vec::new();
    let mut covered = BTreeSet::new();
    for (kind, content) in samples::all() {
        covered.insert(kind);
        if !kinds("config.yaml", &content).contains(&kind) {
            missed.push((kind, content));
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
    let all: BTreeSet<_> = RULES.rules.iter().map(|rule| rule.kind).collect();
    let untested: Vec<_> = all.difference(&covered).collect();
    assert!(untested.is_empty(), "{untested:?}");
    for rule in &RULES.rules {
        rule.regex();
    }
}

#[test]
fn a_finding_says_where_and_never_what() {
    let content = format!("one\ntwo\nkey: sk_live_{}\n", "a1B2c3D4e5F6g7H8");
    let found = find(Path::new("a.md"), content.as_bytes(), None);
    assert_eq!((found[0].kind(), found[0].line), ("a Stripe secret key", 3));
    // What was there before is nobody's news; another one is.
    let earlier = content.clone().into_bytes();
    assert!(find(Path::new("a.md"), content.as_bytes(), Some(&earlier)).is_empty());
    let more = format!("{content}sk_live_{}\n", "Z9y8X7w6V5u4T3s2");
    let found = find(Path::new("a.md"), more.as_bytes(), Some(&earlier));
    assert_eq!((found.len(), found[0].line), (1, 4));
}

#[test]
fn what_stands_in_ordinary_sites_passes() {
    let lines = [
        ("a.env.example", "API_KEY=your-api-key-here"),
        ("a.env.example", "API_KEY=YOUR_API_KEY"),
        (
            "a.env.example",
            "STRIPE_SECRET_KEY=sk_live_xxxxxxxxxxxxxxxxxxxxxxxx",
        ),
        ("a.env.example", "STRIPE_SECRET_KEY=sk_test_..."),
        (
            "a.env.example",
            "DATABASE_URL=postgres://user:password@localhost:5432/db",
        ),
        ("a.env.example", "PASSWORD=changeme"),
        ("a.env.example", "SECRET=<your secret>"),
        ("a.env.example", "TOKEN=${TOKEN}"),
        ("a.md", "Set `AWS_ACCESS_KEY_ID` to AKIAIOSFODNN7EXAMPLE"),
        (
            "a.md",
            "curl -H \"Authorization: Bearer $TOKEN\" https://api.example.com",
        ),
        (
            "a.md",
            "curl -H 'Authorization: Bearer YOUR_ACCESS_TOKEN_HERE' x",
        ),
        ("a.md", "git clone https://github.com/acme/site.git"),
        (
            "a.md",
            "Ask ssh://git@github.com:22/acme/site or mailto:hello@example.com",
        ),
        ("a.ts", "const apiKey = import.meta.env.PUBLIC_API_KEY_2;"),
        ("a.ts", "const token = process.env.GITHUB_TOKEN_V2 ?? '';"),
        ("a.ts", "const password = formData.get('password1');"),
        ("a.ts", "password: z.string().min(8).max(64),"),
        (
            "a.ts",
            "type Props = { accessToken: string; secretKey?: string }",
        ),
        (
            "a.ts",
            "const { token: csrfToken2, secret } = await getTokens(id1);",
        ),
        ("a.ts", "publishableKey: 'pk_live_a1B2c3D4e5F6g7H8i9J0'"),
        (
            "a.ts",
            "posthog.init('phc_a1B2c3D4e5F6g7H8i9J0k1L2m3N4', { api_host })",
        ),
        ("a.js", "this.s.getDerivedStateFromProps(e)"),
        ("a.js", "e.secretKeyProp=t.keyCode,e.token=n.tokenType2"),
        (
            "a.json",
            r#"{"password": "Passwort", "forgot_password": "Passwort vergessen?"}"#,
        ),
        (
            "a.json",
            r#"{"passwordHint": "mindestens 8 Zeichen!", "token": "Token 2"}"#,
        ),
        (
            "a.json",
            r#"{"secret": "our-secret-sauce-recipe-2024-edition"}"#,
        ),
        (
            "a.json",
            r#"{"token": "color-primary-500", "apiKey": "docs-search-key-v2"}"#,
        ),
        (
            "a.html",
            "<input type=\"password\" name=\"password1\" id=\"password1\">",
        ),
        (
            "a.html",
            "<script src=x.js integrity=\"sha384-oqVuAfXRKap7fdgcCY5uykM6+R9GqQ8K/ux\" crossorigin></script>",
        ),
        (
            "a.html",
            "<div class=\"g-recaptcha\" data-sitekey=\"6LeIxAcTAAAAAJcZVRqyHh71UMIEGNQ_MXjiZKhI\"></div>",
        ),
        (
            "a.html",
            "<a href=\"https://maps.example.com/?q=Acme:Main@52.5,13.4\">x</a>",
        ),
        (
            "a.css",
            ".desk-mask-a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6a1b2c3d4e5f6a7b8 { color: #a1b2c3 }",
        ),
        (
            "a.css",
            "@font-face{src:url(data:font/woff2;base64,d09GMgABAAAAAAQKIA4AAAAACDgAAAO2AAEAAAAAAAAAA)}",
        ),
        (
            "a.svg",
            "<path d=\"M12 2C6.48 2 2 6.48 2 12s4.48 10 10 10 10-4.48 10-10S17.52 2 12 2z\" token=\"a1b2c3d4e5f6a7b8c9d0\"/>",
        ),
        (
            "package-lock.json",
            r#""integrity": "sha512-Zx0a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0u1V2w3X4y5Z6a7B8c9D0e1F2g3H4i5J6k7L8m9N0o1P==", "token": "a1B2c3D4e5F6g7H8i9J0k1L2""#,
        ),
        (
            "pnpm-lock.yaml",
            "resolution: {integrity: sha512-a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0==}",
        ),
        (
            "a.txt",
            "supabase eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJzdXBhYmFzZSIsInJvbGUiOiJhbm9uIn0.abcdefghijklmnopqrstuvwxyz012345",
        ),
        (
            "a.md",
            "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0IjoxNTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c",
        ),
        (
            "a.pem",
            "-----BEGIN CERTIFICATE-----\nMIIB\n-----BEGIN PUBLIC KEY-----\nMIIB",
        ),
        ("a.md", "the text PRIVATE KEY----- alone"),
        (
            "a.ts",
            "ALGOLIA_SEARCH_KEY: '0a1b2c3d4e5f60718293a4b5c6d7e8f9'",
        ),
    ];
    let mut held = Vec::new();
    for (path, content) in lines {
        let found = kinds(path, content);
        if !found.is_empty() {
            held.push((path, content, found));
        }
    }
    assert!(held.is_empty(), "{held:#?}");
}

#[test]
fn the_built_in_site_and_our_own_sources_pass() {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("workspace-template")];
    folders.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    folders.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs"));
    let (mut count, mut held) = (0, Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.ends_with("node_modules") || path.ends_with("rules.txt") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            count += 1;
            let content = std::fs::read(&path).unwrap();
            for finding in find(&path, &content, None) {
                held.push(format!(
                    "{}:{}: {}",
                    path.display(),
                    finding.line,
                    finding.kind()
                ));
            }
        }
    }
    assert!(count > 50, "{count}");
    // Tests of ours that hold things which look like secrets, and are meant to.
    const TESTS: [&str; 5] = [
        "/tests.rs",
        "samples.rs",
        "telemetry.rs",
        "routing.rs",
        "source.rs",
    ];
    held.retain(|line| !TESTS.iter().any(|test| line.contains(test)));
    assert!(held.is_empty(), "{held:#?}");
}

#[test]
fn random_bytes_and_large_files_pass_quickly() {
    // What stands in an image, and in base64 in a stylesheet.
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let image: Vec<u8> = (0..1 << 20).flat_map(|_| random().to_le_bytes()).collect();
    let found = find(Path::new("a.png"), &image, None);
    assert!(found.is_empty(), "{found:?}");
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(&image);
    let found = find(Path::new("a.css"), text.as_bytes(), None);
    assert!(found.is_empty(), "{found:?}");

    // Many words of ours and no secret: a bundle of 20 MB.
    let line =
        "e.password=t.token,this.secretKey=n,apiKey:r.access_token||\"key\";https://a.b/c?d=e ";
    let bundle = line.repeat(20_000_000 / line.len());
    let started = Instant::now();
    assert!(find(Path::new("a.js"), bundle.as_bytes(), None).is_empty());
    let limit = if cfg!(debug_assertions) { 60 } else { 2 };
    assert!(
        started.elapsed().as_secs() < limit,
        "{:?}",
        started.elapsed()
    );
    eprintln!("20 MB of code: {:?}", started.elapsed());
}
