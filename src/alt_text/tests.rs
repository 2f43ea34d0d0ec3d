//! Which images are found, and what becomes of their files.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A site in memory.
pub(super) struct Site(BTreeMap<String, Vec<u8>>);

pub(super) fn site(files: &[(&str, &str)]) -> Site {
    let files = files.iter();
    Site(
        files
            .map(|(path, text)| ((*path).into(), text.as_bytes().to_vec()))
            .collect(),
    )
}

impl Files for Site {
    fn paths(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn has(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }

    fn read(&self, path: &str, limit: u64) -> Option<Vec<u8>> {
        self.0
            .get(path)
            .filter(|text| text.len() as u64 <= limit)
            .cloned()
    }
}

/// A site of one file, and images `a.png` to `d.png` where a page may have them.
fn with_page(path: &str, text: &str) -> Site {
    let mut site = site(&[(path, text)]);
    for name in ["a", "b", "c", "d", "divider"] {
        for folder in ["src/assets", "public"] {
            site.0
                .insert(format!("{folder}/{name}.png"), name.as_bytes().to_vec());
        }
    }
    site
}

/// Texts for all that is asked about: `say` of the image's name.
fn texts_for(site: &Site, say: impl Fn(&str) -> String) -> Texts {
    let sights = look(site, None, &mut |_, _| {});
    let texts = sights.wanted.into_iter().map(|wanted| {
        let text = write::clean(&say(&wanted.image)).ok_or_else(|| "no words".to_owned());
        (wanted.subject, text)
    });
    texts.collect()
}

/// The one page after all was written, and the report.
fn described(path: &str, text: &str, say: impl Fn(&str) -> String) -> (String, Report) {
    let mut site = with_page(path, text);
    let texts = texts_for(&site, say);
    let (written, report) = write_all(&site, None, &texts);
    site.0.extend(written);
    // Nothing is left to do.
    let (again, left) = write_all(&site, None, &texts);
    assert!(again.is_empty() && left.done.is_empty(), "{left:?}");
    assert_eq!(
        (left.person.len(), left.decorative),
        (report.person.len(), report.decorative)
    );
    let page = String::from_utf8(site.0.remove(path).unwrap()).unwrap();
    (page, report)
}

fn plainly(path: &str, text: &str) -> (String, Report) {
    described(path, text, |image| {
        let (_, name) = image.rsplit_once('/').unwrap();
        format!("An {}", name.trim_end_matches(".png"))
    })
}

/// In a page of this kind the first becomes the second.
fn becomes(path: &str, before: &str, after: &str) {
    let (page, report) = plainly(path, before);
    assert_eq!(page, after, "{path}: {report:?}");
}

#[test]
fn what_tools_make_is_no_page_and_a_page_may_be_called_so() {
    let has = |file: &str| file == "packages/web/package.json";
    for (path, is_page) in [
        ("src/pages/tests/index.html", true),
        ("src/pages/out/build.html", true),
        ("public/vendor/x.html", true),
        ("packages/web/src/test/x.html", true),
        ("packages/other/dist/x.html", true),
        ("packages/web/dist/x.html", false),
        ("dist/x.html", false),
        ("tests/x.html", false),
        ("src/__tests__/x.jsx", false),
        ("src/node_modules/x/x.html", false),
        ("src/.cache/x.html", false),
        ("README.md", false),
        ("src/README.md", true),
    ] {
        assert_eq!(is_of_site(path, has), is_page, "{path}");
    }
}

const ASTRO: &str = "src/pages/x.astro";

#[test]
fn every_kind_of_file_gets_its_texts_and_keeps_all_else() {
    becomes(
        ASTRO,
        "\u{feff}---\r\nimport { Image as Pic, Picture } from 'astro:assets';\r\nimport a from '../assets/a.png';\r\nconst s = `<img src=\"/b.png\">`; // <img src=\"/c.png\">\r\n---\r\n<!-- <img src=\"/c.png\"> -->\r\n<Pic\r\n  src={a}\r\n  width={800}\r\n/>\r\n<Picture src={a} formats={['avif']} alt={\"\"} />\r\n{items.map((i) => i < 3 && <li><img alt='' src='/b.png'></li>)}\r\n<script>const t = '<img src=\"/d.png\">';</script>\r\n<style>a { content: '<img>' }</style>\r\n",
        "\u{feff}---\r\nimport { Image as Pic, Picture } from 'astro:assets';\r\nimport a from '../assets/a.png';\r\nconst s = `<img src=\"/b.png\">`; // <img src=\"/c.png\">\r\n---\r\n<!-- <img src=\"/c.png\"> -->\r\n<Pic\r\n  src={a}\r\n  alt=\"An a\"\r\n  width={800}\r\n/>\r\n<Picture src={a} formats={['avif']} alt=\"An a\" />\r\n{items.map((i) => i < 3 && <li><img alt=\"An b\" src='/b.png'></li>)}\r\n<script>const t = '<img src=\"/d.png\">';</script>\r\n<style>a { content: '<img>' }</style>\r\n",
    );
    becomes(
        "src/App.tsx",
        "import a from './assets/a.png';\nconst id = <T,>(x: T) => x;\nconst two = <T extends string>(x: T) => x;\nconst p = 4 / 2; const r = /<img src=\"\\/b.png\">/;\nexport default () => (\n  <main>{/* <img src=\"/b.png\" /> */}\n    <img src={a} />\n    {ok ? <img alt src=\"/b.png\" /> : `<img src=\"/b.png\" />`}\n  </main>\n);\n",
        "import a from './assets/a.png';\nconst id = <T,>(x: T) => x;\nconst two = <T extends string>(x: T) => x;\nconst p = 4 / 2; const r = /<img src=\"\\/b.png\">/;\nexport default () => (\n  <main>{/* <img src=\"/b.png\" /> */}\n    <img src={a} alt=\"An a\" />\n    {ok ? <img alt=\"An b\" src=\"/b.png\" /> : `<img src=\"/b.png\" />`}\n  </main>\n);\n",
    );
    becomes(
        "src/content/x.md",
        "---\ntitle: X\n---\n![](../assets/a.png) and ![ ][ref], `![](/b.png)`, ![Yes](/b.png)\n\n    ![](/b.png)\n\n```md\n![](/c.png)\n```\n\n1. one\n\n    ![](/d.png \"T\")\n\n<!-- ![](/c.png) --> <img src=/c.png>\n\n[ref]: </b.png>\n",
        "---\ntitle: X\n---\n![An a](../assets/a.png) and ![An b][ref], `![](/b.png)`, ![Yes](/b.png)\n\n    ![](/b.png)\n\n```md\n![](/c.png)\n```\n\n1. one\n\n    ![An d](/d.png \"T\")\n\n<!-- ![](/c.png) --> <img src=/c.png alt=\"An c\">\n\n[ref]: </b.png>\n",
    );
    becomes(
        "src/content/x.mdx",
        "import { Image } from 'astro:assets';\nimport a from '../assets/a.png';\n\nexport const b = 1;\n\n# It's {b < 2} `![](/b.png)` \\![](/b.png)\n\n<Image src={a} alt=\"\" />\n\n~~~\n![](/c.png) <Image src={a} />\n~~~\n\n![](/d.png)\n",
        "import { Image } from 'astro:assets';\nimport a from '../assets/a.png';\n\nexport const b = 1;\n\n# It's {b < 2} `![](/b.png)` \\![](/b.png)\n\n<Image src={a} alt=\"An a\" />\n\n~~~\n![](/c.png) <Image src={a} />\n~~~\n\n![An d](/d.png)\n",
    );
    becomes(
        "src/x.svelte",
        "<script>\n  import a from './assets/a.png';\n  const s = '<img src=\"/b.png\">';\n</script>\n{#if n < 3}<img src={a}>{:else}{@html '<img src=\"/c.png\">'}{/if}<p>a/b</p>\n<img alt=\"\" src=\"/b.png\" />\n",
        "<script>\n  import a from './assets/a.png';\n  const s = '<img src=\"/b.png\">';\n</script>\n{#if n < 3}<img src={a} alt=\"An a\">{:else}{@html '<img src=\"/c.png\">'}{/if}<p>a/b</p>\n<img alt=\"An b\" src=\"/b.png\" />\n",
    );
    becomes(
        "src/x.vue",
        "<script setup>\nimport a from './assets/a.png'\n</script>\n<template>\n  <p>{{ n < 3 ? '<img src=\"/c.png\">' : '' }}</p>\n  <img :src=\"a\">\n  <img :alt=\"text\" src=\"/b.png\">\n  <img src=\"@/assets/b.png\" alt />\n</template>\n",
        "<script setup>\nimport a from './assets/a.png'\n</script>\n<template>\n  <p>{{ n < 3 ? '<img src=\"/c.png\">' : '' }}</p>\n  <img :src=\"a\" alt=\"An a\">\n  <img :alt=\"text\" src=\"/b.png\">\n  <img src=\"@/assets/b.png\" alt=\"An b\" />\n</template>\n",
    );
    becomes(
        "public/x.html",
        "<!doctype html>\n<title>a < b <img src=/a.png></title><IMG SRC=a.png><p>1 < 2<img src='/b.png' ALT='' >\n<textarea><img src=/a.png></textarea>",
        "<!doctype html>\n<title>a < b <img src=/a.png></title><IMG SRC=a.png alt=\"An a\"><p>1 < 2<img src='/b.png' alt=\"An b\" >\n<textarea><img src=/a.png></textarea>",
    );
}

#[test]
fn a_component_that_is_given_an_empty_text_gets_one() {
    becomes(
        ASTRO,
        "---\nimport Hero from '../Hero.astro';\nimport a from '../assets/a.png';\n---\n<Hero\n  title=\"Pots\"\n  image={a}\n  alt=\"\"\n/><Hero image={a} /><Hero cover={a} logo=\"/b.png\" coverAlt=\"\" />",
        "---\nimport Hero from '../Hero.astro';\nimport a from '../assets/a.png';\n---\n<Hero\n  title=\"Pots\"\n  image={a}\n  alt=\"An a\"\n/><Hero image={a} /><Hero cover={a} logo=\"/b.png\" coverAlt=\"An a\" />",
    );
}

#[test]
fn what_is_there_to_be_seen_alone_stays() {
    for image in [
        "<img role=\"presentation\" src=\"/a.png\">",
        "<img role=none alt=\"\" src=\"/a.png\">",
        "<img aria-hidden=\"true\" src=\"/a.png\">",
        "<img aria-hidden={true} src=\"/a.png\">",
        "<div aria-hidden=\"true\"><p><img src=\"/a.png\" alt=\"\"></p></div>",
        "<a href=\"/\"><img alt=\"\" src=\"/a.png\"> Home</a>",
        "<a href=\"/\">{name}<img alt=\"\" src=\"/a.png\"></a>",
        "<button aria-label=\"Close\"><img alt=\"\" src=\"/a.png\"></button>",
        "<img src=\"/a.png\" width=\"1\" height=1>",
        "<img alt=\"\" src=\"/a.png\" width=\"24\" height={24}>",
        "<img alt=\"\" src=\"/divider.png\">",
        "<img alt=\"\" class=\"absolute -z-10\" src=\"/a.png\">",
    ] {
        let (page, report) = plainly(ASTRO, image);
        assert_eq!(page, image);
        assert_eq!(
            (report.decorative, report.done.len()),
            (1, 0),
            "{image}: {report:?}"
        );
    }
    let bare = "export default () => <p aria-hidden><img src=\"/a.png\" /></p>;";
    assert_eq!(plainly("src/x.jsx", bare).1.decorative, 1);
    // Nobody has said so of these.
    for image in [
        "<a href=\"/\"><img alt=\"\" src=\"/a.png\"></a>",
        "<a href=\"/\">Home <img src=\"/a.png\"></a>",
        "<img src=\"/divider.png\">",
        "<p aria-hidden={false}><img src=\"/a.png\"></p>",
        "<p aria-hidden=\"true\"></p><img alt=\"\" src=\"/a.png\">",
        "<figure><img alt=\"\" src=\"/a.png\"><figcaption>Pots</figcaption></figure>",
    ] {
        let (_, report) = plainly(ASTRO, image);
        assert_eq!(
            (report.decorative, report.done.len()),
            (0, 1),
            "{image}: {report:?}"
        );
    }
}

#[test]
fn what_a_program_cannot_know_is_a_person_s() {
    for (image, why) in [
        ("<img src={post.cover}>", "chosen"),
        ("<img src={`${base}/a.png`}>", "chosen"),
        ("<img {...props}>", "elsewhere"),
        ("<img {...props} src=\"/a.png\" alt=\"\">", "elsewhere"),
        ("<img src=\"https://example.com/a.png\">", "another server"),
        ("<img src=\"/gone.png\">", "not among"),
        ("<img src=\"data:image/png;base64,AAAA\">", "data:"),
        ("<img src=\"/a.svg\">", "SVG"),
        ("<img>", "chosen"),
        ("<Card user={user} alt=\"\" />", "chosen"),
    ] {
        let mut site = with_page(ASTRO, image);
        site.0.insert("public/a.svg".into(), Vec::new());
        let texts = texts_for(&site, |_| "A".into());
        let (written, report) = write_all(&site, None, &texts);
        assert!(written.is_empty(), "{image}");
        assert_eq!(report.person.len(), 1, "{image}: {report:?}");
        assert!(report.person[0].why.contains(why), "{image}: {report:?}");
    }
    let data = "---\ntitle: A\ncover: ./a.png\ncoverAlt: \"\"\n---\n";
    let (page, report) = plainly("src/content/x.md", data);
    assert_eq!(page, data);
    assert_eq!(
        (report.person.len(), report.person[0].line),
        (1, 4),
        "{report:?}"
    );
}

#[test]
fn a_file_that_does_not_add_up_is_left_alone() {
    for page in [
        "<p>{a ? <img src=\"/a.png\"> : (}</p>",
        "<img src=\"/a.png>",
        "---\n<img src=\"/a.png\">",
        "<script>\n<img src=\"/a.png\">",
        "{'unfinished}<img src=\"/a.png\">",
        "<img src=\"/a.png\"> }",
    ] {
        let (after, report) = plainly(ASTRO, page);
        assert_eq!(after, page);
        assert_eq!(report.person.len(), 1, "{page}: {report:?}");
        assert!(report.person[0].why.contains("certainty"), "{report:?}");
    }
    // Levels in each other, each of which has to be read twice.
    let deep = format!("{}{}", "{<a b={".repeat(30), ",}".repeat(60));
    plainly(ASTRO, &deep);
    plainly(ASTRO, &"{".repeat(100_000));
    plainly(ASTRO, &"<a b={".repeat(100_000));
    plainly("src/a.md", &"![".repeat(50_000));
}

/// Long pages in which something begins again and again, and never is what it begins as. Read
/// as often as they suggest, each would take minutes.
#[test]
fn a_page_that_is_made_to_be_read_for_ever_is_not() {
    const SIZE: usize = 1 << 17;
    let full = |piece: &str| piece.repeat(SIZE / piece.len());
    let half = |begin: &str, piece: &str| {
        begin.repeat(SIZE / 2 / begin.len()) + &piece.repeat(SIZE / 2 / piece.len())
    };
    let ticks: String = (1..500).map(|length| "`".repeat(length) + " ").collect();
    for (path, text) in [
        ("src/a.mdx", full("![")),
        ("src/a.mdx", full("![](")),
        ("src/a.mdx", full("![ ](\n")),
        ("src/a.mdx", full("\n")),
        ("src/a.mdx", full("\r\n")),
        ("src/a.mdx", full("![][")),
        ("src/a.mdx", full("[a]: b\n")),
        ("src/a.mdx", half("\n", "x\n[a]: b\n")),
        ("src/a.mdx", half("![][", "[a]: b\n")),
        ("src/a.mdx", ticks),
        ("src/a.mdx", half(" ", "<a<")),
        (ASTRO, half(" ", "< ")),
        (ASTRO, half("\n", "<a<")),
        (ASTRO, full("<a ")),
        (ASTRO, full("</a>")),
        ("src/a.html", full("<a><b>")),
        ("src/a.html", full("<script>")),
        ("src/a.html", half("<a>", "</b>")),
        ("src/a.tsx", full("<a ")),
        ("src/a.tsx", full("a < ")),
        ("src/a.tsx", full("import a\n")),
        ("src/a.vue", full("{{")),
        ("src/a.md", full("<a ")),
        ("src/a.md", full("`")),
    ] {
        let text = &text[..text.len().min(SIZE)];
        let (after, _) = plainly(path, text);
        assert!(after == text, "{path} with {:?}", &text[..20]);
    }
}

#[test]
fn a_site_of_too_many_images_is_left_to_a_person_from_there() {
    let page = "<img src=\"/a.png\">".repeat(9_000);
    let mut site = with_page(ASTRO, &page);
    for number in 0..3 {
        let path = format!("src/pages/y{number}.astro");
        site.0.insert(path, page.clone().into_bytes());
    }
    // With aliases that each image has to be held against.
    let aliases: String = (0..2_000)
        .map(|number| format!("\"a{number}/*\": [\"b/*\"],"))
        .collect();
    site.0.insert("tsconfig.json".into(), aliases.into_bytes());
    let texts = texts_for(&site, |_| "A".into());
    let (written, report) = write_all(&site, None, &texts);
    assert_eq!((written.len(), report.person.len()), (2, 2));
    assert!(
        report.person[0].why.contains("too many"),
        "{:?}",
        report.person
    );
}

#[test]
fn a_component_is_not_what_html_calls_so() {
    becomes(
        "src/Nav.tsx",
        "export default () => (\n  <p>\n    <Link href=\"/\">It's <b>home</b></Link>\n    <Input>x</Input>\n    <img src=\"/a.png\" />\n  </p>\n);\n",
        "export default () => (\n  <p>\n    <Link href=\"/\">It's <b>home</b></Link>\n    <Input>x</Input>\n    <img src=\"/a.png\" alt=\"An a\" />\n  </p>\n);\n",
    );
    becomes(
        ASTRO,
        "<Style><img src=\"/a.png\"></Style><Script>{x}</Script>{b && <p><Source>x</Source><img src=\"/b.png\"></p>}",
        "<Style><img src=\"/a.png\" alt=\"An a\"></Style><Script>{x}</Script>{b && <p><Source>x</Source><img src=\"/b.png\" alt=\"An b\"></p>}",
    );
    // In HTML capitals are the same.
    becomes(
        "public/x.html",
        "<LINK href=x><SCRIPT><img src=/a.png></SCRIPT><img src=/a.png>",
        "<LINK href=x><SCRIPT><img src=/a.png></SCRIPT><img src=/a.png alt=\"An a\">",
    );
    // A link that is a component speaks for its image, as any other does.
    let said = "export default () => <Link href=\"/\"><img alt=\"\" src=\"/a.png\" /> Home</Link>;";
    let (_, report) = plainly("src/Nav.tsx", said);
    assert_eq!((report.decorative, report.done.len()), (1, 0), "{report:?}");
}

#[test]
fn a_paragraph_ends_whatever_its_lines_end_with() {
    for end in ["\n", "\r\n", " \n"] {
        let text = format!("a ` b{end}{end}![](/a.png){end}{end}![ {end}{end}](/b.png) ` c{end}");
        let expected = text.replacen("![]", "![An a]", 1);
        becomes("src/content/x.mdx", &text, &expected);
    }
}

#[test]
fn an_address_that_stands_apart_is_found_by_its_name() {
    let page = "# Pots\n\n![][The  Pot] and ![ ][b], ![][gone], ![Yes][b], ![][^b]\n\n[the pot]: ../assets/a.png \"T\"\n[B]: </b.png>\n[b]: /c.png\n\n```md\n[gone]: /c.png\n```\n";
    let expected = page
        .replace("![][The", "![An a][The")
        .replace("![ ][b]", "![An b][b]");
    for path in ["src/content/x.md", "src/content/x.mdx"] {
        let (after, report) = plainly(path, page);
        assert_eq!(after, expected, "{path}");
        assert_eq!(
            (report.done.len(), report.person.len()),
            (2, 0),
            "{path}: {report:?}"
        );
        let (after, report) = plainly(path, "![][a]\n\n[a]: https://example.com/a.png\n");
        assert!(after.starts_with("![][a]"), "{path}");
        assert!(report.person[0].why.contains("another server"), "{path}");
    }
    // An address that is put together by more than one line is a person's; what is none is a text.
    for (address, person) in [
        ("text\n[a]: /a.png", 1),
        ("> [a]: /a.png", 1),
        ("[a]:\n/a.png", 1),
        ("[a]: /a.png \"T\nT\"", 1),
        ("text [a]: /a.png", 0),
        ("`[a]: /a.png`", 0),
        ("{`\n\n[a]: /a.png`}", 0),
    ] {
        let page = format!("{address}\n\n![][a] ![Yes][a]\n");
        let (after, report) = plainly("src/content/x.mdx", &page);
        assert_eq!(after, page);
        assert_eq!(report.person.len(), person, "{page}: {report:?}");
        assert!(
            report.person.iter().all(|left| left.why.contains("apart")),
            "{report:?}"
        );
    }
}

#[test]
fn a_hostile_text_stays_a_text() {
    let hostile = "{{ page.secret }} {% raw %} \" onerror=\"alert(1)\" x='y' <script>alert(1)</script> {process.exit()} ${x} `b` ](javascript:x) ![c](d) \\ && --> --- *e* _f_ | g\n\n# h";
    let clean = write::clean(hostile).unwrap();
    for (path, text) in [
        (
            ASTRO,
            "<p>\n<img src=\"/a.png\"> {b && <img alt='' src=\"/b.png\">}</p>",
        ),
        (
            "src/a.tsx",
            "export default () => <p><img src=\"/a.png\" /></p>;",
        ),
        ("src/a.html", "<p><img src='/a.png' alt=''></p>"),
        (
            "src/a.vue",
            "<template><img src='/a.png' alt=''></template>",
        ),
        ("src/a.svelte", "<p><img src='/a.png' alt=''></p>"),
        (
            "src/a.mdx",
            "# A\n\na ` ![](/a.png) ![][c] and <img src=\"/b.png\" />\n\n[c]: /c.png\n",
        ),
        (
            "src/a.md",
            "# A\n\na ` ![](/a.png) and <img src=\"/b.png\">\n\n| ![](/c.png) | <img src=/d.png> |\n|-|-|\n",
        ),
    ] {
        let (page, report) = described(path, text, |_| hostile.to_owned());
        assert!(
            !report.done.is_empty() && report.person.is_empty(),
            "{path}: {report:?}\n{page}"
        );
        assert!(report.done.iter().all(|done| done.alt == clean));
        assert_eq!(page.lines().count(), text.lines().count(), "{page}");
        // Nor is it a template's.
        assert!(!page.contains("{{") && !page.contains("{%"), "{page}");
        if path.ends_with(".md") {
            let mut html = String::new();
            let mut alts = Vec::new();
            let options = pulldown_cmark::Options::ENABLE_TABLES;
            let mut in_image = false;
            for event in pulldown_cmark::Parser::new_ext(&page, options) {
                use pulldown_cmark::{Event, Tag, TagEnd};
                match event {
                    Event::Start(Tag::Image { .. }) => {
                        in_image = true;
                        alts.push(String::new());
                    }
                    Event::End(TagEnd::Image) => in_image = false,
                    Event::Text(text) if in_image => alts.last_mut().unwrap().push_str(&text),
                    Event::InlineHtml(tag) => html.push_str(&tag),
                    _ => {}
                }
            }
            assert_eq!(alts, [clean.clone(), clean.clone()]);
            assert_eq!(html.matches("<img").count(), 2, "{html}");
        }
    }
}

#[test]
fn what_was_edited_meanwhile_is_left_for_the_next_time() {
    let page = "<img src=\"/a.png\">\n<img src=\"/b.png\">\n";
    let mut site = with_page(ASTRO, page);
    let texts = texts_for(&site, |_| "A".into());
    site.0.insert("public/a.png".into(), b"another".to_vec());
    site.0.insert(
        ASTRO.into(),
        format!("<h1>New</h1>\n{page}<img src=\"/c.png\">").into_bytes(),
    );
    let (written, report) = write_all(&site, None, &texts);
    let new = str::from_utf8(&written[0].1).unwrap();
    assert_eq!(
        new,
        "<h1>New</h1>\n<img src=\"/a.png\">\n<img src=\"/b.png\" alt=\"A\">\n<img src=\"/c.png\">"
    );
    assert_eq!((report.done.len(), report.done[0].line), (1, 3));
    assert_eq!(report.person.len(), 2, "{report:?}");
}

#[test]
fn one_image_is_asked_about_once_in_each_language_and_other_files_not_at_all() {
    let page = "<img src=\"/a.png\"><img src=\"/a.png\">";
    let mut site = with_page(ASTRO, page);
    for path in [
        "src/pages/de/x.astro",
        "node_modules/x/y.astro",
        "README.md",
        ".x/y.md",
        "dist/x.html",
    ] {
        let text = if path.ends_with("md") {
            "![](/a.png)"
        } else {
            page
        };
        site.0.insert(path.into(), text.into());
    }
    site.0.insert(
        "src/layouts/L.astro".into(),
        "<html lang=\"fr\"><slot /></html>".into(),
    );
    let mut kept = 0;
    let sights = look(&site, None, &mut |_, bytes| {
        assert_eq!(bytes, b"a");
        kept += 1;
    });
    let mut languages: Vec<_> = sights
        .wanted
        .iter()
        .map(|wanted| wanted.subject.language.as_deref().unwrap())
        .collect();
    languages.sort_unstable();
    assert_eq!((languages, kept), (vec!["de", "fr"], 2));
    let all = look(&site, Some("es"), &mut |_, _| {});
    assert_eq!(all.wanted.len(), 1);
}

#[test]
fn a_model_is_told_what_stands_around() {
    let text = "---\ntitle: \"Our pots\"\n---\n# Kiln\n\nBefore it.\n\n![](../assets/a.png)\n\nAfter it.\n";
    let site = with_page("src/content/x.md", text);
    let wanted = look(&site, None, &mut |_, _| {}).wanted.swap_remove(0);
    assert_eq!(wanted.title.as_deref(), Some("Our pots"));
    assert_eq!(wanted.around, "Kiln Before it. … After it.");
}

/// Pieces that files are made of, some of them broken.
fn piece() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "<p>",
        "</p>",
        "<img src=\"/a.png\">",
        "<img src='/b.png' alt=''/>",
        "<a href=x>",
        "</a>",
        "{",
        "}",
        "{a < b}",
        "{x && <img src=\"/c.png\" />}",
        "`",
        "\"",
        "'",
        "<!--",
        "-->",
        "text ",
        "\n",
        "\r\n",
        "\n\n",
        "    ",
        "![](/d.png)",
        "![x](/d.png)",
        "```\n",
        "---\n",
        "<script>",
        "</script>",
        "<style>",
        "</style>",
        "<",
        ">",
        "/",
        "\\",
        "é",
        "字",
        "import a from './a.png';\n",
        "<Image src={a} />",
        "{...p}",
        "[",
        "](",
        "* ",
        "> ",
        "|",
        "<T,>",
        "${",
        "/*",
        "*/",
        "//",
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a file is: it is read without harm, nothing but texts is added to it, and what was
    /// written is not found again.
    #[test]
    fn any_file_keeps_every_byte(
        parts in prop::collection::vec(piece(), 0..40),
        ending in prop::sample::select(vec!["astro", "tsx", "html", "vue", "svelte", "mdx", "md"]),
        said in "\\PC{1,40}",
    ) {
        let text = parts.concat();
        let path = format!("src/pages/x.{ending}");
        let mut site = with_page(&path, &text);
        let texts = texts_for(&site, |_| said.clone());
        let (written, report) = write_all(&site, None, &texts);
        match written.first() {
            None => prop_assert!(report.done.is_empty()),
            Some((_, bytes)) => {
                // Without what was added it is what it was: all bytes are there, in their order.
                let mut rest = bytes.iter();
                let alts = ["alt=''", "alt=\"\""];
                let kept = alts.iter().fold(text.clone(), |text, alt| text.replace(alt, ""));
                prop_assert!(kept.bytes().all(|byte| rest.any(|there| *there == byte)));
            }
        }
        site.0.extend(written);
        let (again, left) = write_all(&site, None, &texts);
        prop_assert!(again.is_empty(), "{:?}", again);
        prop_assert_eq!(left.person.len(), report.person.len());
    }
}
