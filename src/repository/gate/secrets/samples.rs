//! Secrets of every form, put together when the tests run: no file of ours holds one.

/// A kind as the rules name it, and a text that holds one. In braces stand an alphabet and a count.
const SAMPLES: &[(&str, &str)] = &[
    ("a 1Password secret key", "A3-{n6}-{n11}-{n5}-{n5}-{n5}"),
    ("a 1Password service account token", "ops_eyJ{b260}"),
    ("an Adobe client secret", "p8e-{A32}"),
    ("an age secret key", "AGE-SECRET-KEY-1{q58}"),
    ("an age plugin's secret key", "AGE-PLUGIN-YUBIKEY-1{q58}"),
    ("an Airtable access token", "pat{A14}.{h64}"),
    ("an Alibaba Cloud access key", "LTAI{A20}"),
    (
        "an Anthropic API key",
        "ANTHROPIC_API_KEY=sk-ant-api03-{w93}AA",
    ),
    ("an Anthropic API key", "sk-ant-admin01-{w93}AA"),
    ("an Anthropic API key", "sk-ant-oat01-{w93}AA"),
    ("an Artifactory API key", "AKCp{A69}"),
    ("an Artifactory reference token", "cmVmd{A59}"),
    ("an Asana access token", "1/{d16}:{h32}"),
    ("an Atlassian API token", "ATATT3{w186}"),
    ("an Atlassian or Bitbucket token", "ATBB{A32}"),
    ("an Authress access key", "sc_{A20}.{A5}.acc_{A20}.{A60}"),
    ("an AWS access key", "aws_access_key_id = AKIA{u16}"),
    ("an AWS access key", "ASIA{u16}"),
    ("an AWS access key", "A3TX{u16}"),
    ("an Amazon Bedrock API key", "ABSK{b132}"),
    ("an Amazon Bedrock API key", "bedrock-api-key-{b120}"),
    ("a Beamer API token", "b_{A44}"),
    ("a Brevo API key", "xkeysib-{h64}-{A16}"),
    ("a Brevo SMTP key", "xsmtpsib-{h64}-{A16}"),
    ("a Buildkite token", "bkua_{h40}"),
    ("a ClickHouse Cloud key", "4b1d{A38}"),
    ("a Clojars token", "CLOJARS_{h60}"),
    ("a Cloudflare origin key", "v1.0-{h24}-{h146}"),
    ("a Contentful management token", "CFPAT-{w43}"),
    ("a crates.io token", "cio{A32}"),
    ("a Databricks token", "dapi{h32}"),
    ("a Deno Deploy token", "ddp_{A36}"),
    ("a DigitalOcean token", "dop_v1_{h64}"),
    ("a DigitalOcean token", "dor_v1_{h64}"),
    ("a Docker Hub token", "dckr_pat_{w27}"),
    ("a Doppler token", "dp.pt.{A43}"),
    ("a Dropbox token", "sl.{w135}"),
    ("a Duffel token", "duffel_live_{w43}"),
    ("a Dynatrace token", "dt0c01.{A24}.{A64}"),
    ("an EasyPost key", "EZAK{A54}"),
    ("a Facebook access token", "EAAC{A120}"),
    ("a Figma token", "figd_{w40}"),
    ("a Flutterwave key", "FLWSECK_TEST-{h32}-X"),
    ("a Fly.io token", "fo1_{w43}"),
    ("a Fly.io token", "fm2_{b120}"),
    ("a Frame.io token", "fio-u-{w64}"),
    ("a Gitea or Forgejo token", "gta_{A40}"),
    ("a GitHub token", "token: \"ghp_{A36}\""),
    ("a GitHub token", "gho_{A36}"),
    ("a GitHub token", "ghs_{A36}"),
    ("a GitHub token", "ghr_{A36}"),
    ("a GitHub access token", "github_pat_{A22}_{A59}"),
    ("a GitLab token", "glpat-{w20}"),
    ("a GitLab token", "gldt-{w20}"),
    ("a GitLab token", "glrt-t1_{w27}.01.{l7}"),
    ("a GitLab runner token", "GR1348941{w20}"),
    ("a Google API key", "key=AIza{w35}"),
    ("a Google OAuth client secret", "GOCSPX-{w28}"),
    ("a Google OAuth token", "ya29.{w60}"),
    ("a Google refresh token", "1//0{w60}"),
    ("a Grafana API key", "eyJrIjoi{b90}"),
    ("a Grafana Cloud token", "glc_{b60}"),
    ("a Grafana service account token", "glsa_{A32}_{h8}"),
    ("a Groq API key", "gsk_{A52}"),
    ("a Harness token", "pat.{w22}.{A24}.{A20}"),
    ("a HashiCorp Vault token", "hvs.{w95}"),
    ("a HashiCorp Vault token", "s.{A24}"),
    ("a Heroku API key", "HRKU-AA{w58}"),
    ("a HubSpot access token", "pat-na1-{U}"),
    ("a Hugging Face token", "HF_TOKEN=hf_{L34}"),
    ("an Infracost key", "ico-{A32}"),
    ("an Intra42 client secret", "s-s4t2ud-{h64}"),
    ("a LangSmith key", "lsv2_pt_{h32}_{h10}"),
    ("a LaunchDarkly key", "sdk-{U}"),
    ("a Linear API key", "lin_api_{A40}"),
    ("a Lob API key", "live_{h35}"),
    ("a Mailchimp or Mandrill key", "md-{A22}"),
    ("a Mailgun key", "key-{h32}"),
    ("a MailerSend token", "mlsn.{h64}"),
    ("a Mapbox secret token", "sk.eyJ{A77}.{A22}"),
    ("a MaxMind license key", "AA0{A33}_mmk"),
    ("a Mistral or Cohere key", "co_{A40}"),
    ("a Netlify token", "nfp_{A36}"),
    ("a New Relic key", "NRAK-{n27}"),
    ("a New Relic browser key", "NRJS-{h19}"),
    ("a Notion token", "ntn_{d11}{A35}"),
    ("a Notion token", "secret_{A43}"),
    ("an npm token", "npm_{A36}"),
    ("an npm token", "//registry.example.org/:_authToken={U}"),
    ("a NuGet key", "oy2{l43}"),
    ("an Octopus Deploy key", "API-{n26}"),
    ("an OpenAI API key", "sk-proj-{w74}T3BlbkFJ{w74}"),
    ("an OpenAI API key", "sk-{A20}T3BlbkFJ{A20}"),
    ("an OpenAI or like API key", "sk-{A48}"),
    ("an OpenRouter API key", "sk-or-v1-{h64}"),
    ("an OpenShift token", "sha256~{w43}"),
    (
        "a PayPal or Braintree token",
        "access_token$production${l16}${h32}",
    ),
    ("a Perplexity key", "pplx-{A48}"),
    ("a Plaid token", "access-production-{U}"),
    ("a PlanetScale secret", "pscale_tkn_{w43}"),
    ("a PostHog personal key", "phx_{A43}"),
    ("a Postman key", "PMAK-{h24}-{h34}"),
    ("a Prefect token", "pnu_{A36}"),
    ("a Pulumi token", "pul-{h40}"),
    ("a PyPI token", "pypi-AgEIcHlwaS5vcmc{w70}"),
    ("a Razorpay key", "rzp_live_{A14}"),
    ("a ReadMe token", "rdme_{l70}"),
    ("a Replicate token", "r8_{A37}"),
    ("a Resend API key", "re_{A8}_{A24}"),
    ("a RubyGems token", "rubygems_{h48}"),
    ("a Scalingo token", "tk-us-{w48}"),
    ("a SendGrid key", "SG.{A22}.{A43}"),
    (
        "a Sentry organisation token",
        "sntrys_eyJpYXQiO{b120}_{b43}",
    ),
    ("a Sentry user token", "sntryu_{h64}"),
    ("a SettleMint token", "sm_pat_{A16}"),
    ("a Shippo token", "shippo_live_{h40}"),
    ("a Shopify token", "shpat_{h32}"),
    ("a Shopify token", "shpss_{h32}"),
    ("a Slack token", "xoxb-{d12}-{d12}-{A24}"),
    ("a Slack token", "xoxp-{d12}-{d12}-{d12}-{h32}"),
    ("a Slack configuration token", "xoxe.xoxp-1-{A163}"),
    ("a Slack app token", "xapp-1-{n11}-{d12}-{h64}"),
    (
        "a Slack webhook",
        "https://hooks.slack.com/services/T{n8}/B{n8}/{A24}",
    ),
    ("a Sonar token", "squ_{h40}"),
    ("a Sourcegraph token", "sgp_{h16}_{h40}"),
    ("a Square token", "sq0atp-{w22}"),
    ("a Square token", "EAAA{w60}"),
    ("a Stripe secret key", "STRIPE=\"sk_live_{A24}\""),
    ("a Stripe secret key", "rk_live_{A99}"),
    ("a Stripe secret key", "sk_test_{A24}"),
    ("a Stripe webhook secret", "whsec_{A32}"),
    ("a Supabase secret key", "sb_secret_{w31}"),
    ("a Supabase access token", "sbp_{h40}"),
    ("a Tailscale key", "tskey-auth-{A17}-{A32}"),
    (
        "a Telegram bot token",
        "https://api.telegram.org/bot{d10}:AA{w33}/getMe",
    ),
    ("a Telegram bot token", "TELEGRAM_TOKEN={d9}:AA{w33}"),
    ("a Twilio key", "SK{h32}"),
    ("a Typeform token", "tfp_{w59}"),
    ("a Vercel token", "vcp_{A40}"),
    ("a Vercel Blob token", "vercel_blob_rw_{A16}_{A32}"),
    ("a Volcengine or Tencent key", "AKID{A32}"),
    ("a WorkOS or Clerk key", "sk_live_{A20}_{A20}"),
    ("an xAI API key", "xai-{A80}"),
    ("a Yandex key", "AQVN{w35}"),
    ("a Yandex access key", "YCAJ{w36}"),
    (
        "a Zapier or n8n webhook",
        "https://hooks.zapier.com/hooks/catch/{d7}/{l7}/",
    ),
    (
        "a Discord webhook",
        "https://discord.com/api/webhooks/{d18}/{w68}",
    ),
    (
        "a Microsoft Teams webhook",
        "https://acme.webhook.office.com/webhookb2/{U}@{U}/IncomingWebhook/{h32}/{U}",
    ),
    ("a signed token (JWT)", "eyJ{w40}.eyJ{w120}.{w43}"),
    ("a GitLab session", "Cookie: _gitlab_session={h32}"),
    ("a private key", "-----BEGIN RSA PRIVATE KEY-----\n{b64}\n"),
    (
        "a private key",
        "-----BEGIN OPENSSH PRIVATE KEY-----\n{b64}\n",
    ),
    (
        "a private key",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\n{b64}\n",
    ),
    (
        "a private key",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\n{b64}\n",
    ),
    ("a private key", "-----BEGIN EC PRIVATE KEY-----\n{b64}\n"),
    (
        "a private key",
        "{\"type\":\"service_account\",\"private_key\":\"-----BEGIN PRIVATE KEY-----\\n{b64}\\n\"}",
    ),
    (
        "a private key",
        "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\n{b64}",
    ),
    ("a private key", "PuTTY-User-Key-File-3: ssh-ed25519\n{b64}"),
    ("a Discord secret", "DISCORD_TOKEN={w24}.{w6}.{w27}"),
    ("a Discord secret", "discord_client_secret: {A32}"),
    (
        "an Azure storage key",
        "DefaultEndpointsProtocol=https;AccountName=x;AccountKey={b86}==;EndpointSuffix=x",
    ),
    (
        "an Azure access key",
        "Endpoint=sb://x/;SharedAccessKey={b43}=",
    ),
    (
        "an Azure access signature",
        "?sv=2022-11-02&sr=b&sig={A43}%3D",
    ),
    ("an Azure client secret", "AZURE_CLIENT_SECRET={A3}8Q~{w34}"),
    ("an Azure key", "cosmosKey: '{b86}=='"),
    ("a registry password", "_auth = {b40}"),
    (
        "a password for NuGet",
        "<add key=\"ClearTextPassword\" value=\"{A20}\" />",
    ),
    (
        "a Sidekiq licence",
        "BUNDLE_ENTERPRISE__CONTRIBSYS__COM={h8}:{h8}",
    ),
    (
        "a login for a registry",
        "{\"auths\":{\"r.example.org\":{\"auth\": \"{A40}=\"}}}",
    ),
    (
        "a password in an address",
        "postgres://app:{A12}@db.internal:5432/site",
    ),
    (
        "a password in an address",
        "https://deploy:{A20}@git.example.org/site.git",
    ),
    (
        "a password in an address",
        "mongodb+srv://app:{A16}@cluster0.mongodb.net/x",
    ),
    (
        "a password in an address",
        "redis://default:{A16}@cache:6379",
    ),
    (
        "an authorization",
        "curl -H 'Authorization: Bearer {A40}' https://api.example.org",
    ),
    (
        "a login for a machine",
        "machine api.example.org login deploy password {A12}",
    ),
    (
        "a key of a cluster",
        "users:\n- user:\n    client-key-data: {b80}",
    ),
    (
        "a Kubernetes secret",
        "apiVersion: v1\nkind: Secret\nmetadata:\n  name: x\ndata:\n  password: {b24}=",
    ),
    ("a MySQL login", "[client]\nuser = x\npassword = {A12}\n"),
    (
        "a token of an app",
        "credentials \"app.terraform.io\" { token = \"{A14}.atlasv1.{w64}\" }",
    ),
    ("an Adafruit key", "ADAFRUIT_IO_KEY={w32}"),
    ("an Adobe client id", "adobe_client_id = '{h32}'"),
    ("an Airtable key", "AIRTABLE_API_KEY=key{A14}"),
    ("an Algolia key", "ALGOLIA_ADMIN_KEY={h32}"),
    ("an Alibaba Cloud secret", "alibaba_secret: \"{A30}\""),
    ("an Asana id or secret", "asana_client_secret={l32}"),
    ("an Atlassian token", "JIRA_API_TOKEN={l20}{h4}"),
    ("an AWS secret key", "aws_secret_access_key = {b40}"),
    ("an AWS session token", "aws_session_token = {b200}"),
    ("a Bitbucket id or secret", "BITBUCKET_SECRET={w64}"),
    ("a Bittrex key", "bittrex_secret = {l32}"),
    ("a CircleCI token", "CIRCLECI_TOKEN={h40}"),
    ("a Cisco Meraki key", "meraki_api_key = {h40}"),
    ("a Cloudflare key", "CLOUDFLARE_API_TOKEN={w40}"),
    ("a Cloudflare key", "cloudflare_global_api_key: {h37}"),
    (
        "a Cloudinary address",
        "CLOUDINARY_URL=cloudinary://{d15}:{w27}@acme",
    ),
    ("a Codecov token", "CODECOV_TOKEN={l32}"),
    ("a Cohere key", "CO_API_KEY={A40}"),
    ("a Coinbase key", "coinbase_secret={w64}"),
    ("a Confluent key", "confluent_secret={A64}"),
    ("a Contentful token", "CONTENTFUL_ACCESS_TOKEN={w43}"),
    ("a Datadog key", "DD_API_KEY={h32}"),
    ("a Datadog key", "datadog_app_key: {h40}"),
    ("a DeepL key", "DEEPL_AUTH_KEY={U}:fx"),
    (
        "a Defined Networking token",
        "dnkey = \"dnkey-{n26}-{n52}\"",
    ),
    ("a Drone CI token", "DRONE_TOKEN={A32}"),
    ("a Dropbox secret", "dropbox_app_secret = {l15}"),
    ("an Etsy token", "etsy_keystring: {l24}"),
    ("a Facebook secret", "FACEBOOK_APP_SECRET={h32}"),
    ("a Fastly token", "FASTLY_API_TOKEN={w32}"),
    ("a Finicity secret", "finicity_secret={l20}"),
    ("a Finnhub token", "finnhub_token={l20}"),
    ("a Flickr token", "flickr_secret: {l32}"),
    ("a Freemius secret", "'secret_key' => 'sk_{A29}',"),
    ("a FreshBooks token", "freshbooks_token={l64}"),
    ("a Gitter token", "gitter_token={h40}"),
    ("a GoCardless token", "GOCARDLESS_TOKEN=live_{w40}"),
    ("a Heroku key", "HEROKU_API_KEY={U}"),
    ("a HubSpot key", "hubspot_api_key: '{U}'"),
    ("an Intercom key", "intercom_token={w60}"),
    ("a JFrog token", "JFROG_TOKEN={l64}"),
    ("a Klaviyo key", "KLAVIYO_API_KEY=pk_{h34}"),
    ("a Kraken key", "kraken_secret={b86}"),
    ("a KuCoin key", "kucoin_key={h24}"),
    ("a LaunchDarkly key", "launchdarkly_token={w40}"),
    ("a Linear client secret", "linear_client_secret = {h32}"),
    ("a LinkedIn secret", "LINKEDIN_CLIENT_SECRET={A16}"),
    ("a Looker secret", "looker_client_secret = {l24}"),
    ("a Mailchimp key", "MAILCHIMP_KEY={h32}-us14"),
    ("a Mattermost token", "mattermost_token={l26}"),
    ("a MaxMind license key", "maxmind_license_key={A16}"),
    ("a Mapbox token", "mapbox_token=sk.{w80}.{w22}"),
    ("a MessageBird key", "messagebird_key={l25}"),
    ("a Mistral key", "MISTRAL_API_KEY={A32}"),
    ("a Netlify token", "NETLIFY_AUTH_TOKEN={w43}"),
    ("a New Relic key", "new_relic_license={h64}"),
    ("a New York Times key", "nytimes_key={A32}"),
    ("an Okta token", "OKTA_TOKEN=00{w40}"),
    ("a Pinecone key", "PINECONE_API_KEY={U}"),
    ("a Plaid secret", "plaid_secret={l30}"),
    ("a Private AI key", "private_ai_key={l32}"),
    ("a RapidAPI key", "x-rapidapi-key: {l50}"),
    ("a Sanity token", "SANITY_TOKEN=sk{A100}"),
    ("a SendBird token", "sendbird_token={h40}"),
    ("a Sentry token", "SENTRY_AUTH_TOKEN={h64}"),
    ("a Snyk token", "SNYK_TOKEN={U}"),
    ("a Sonar token", "SONAR_TOKEN={h40}"),
    ("a Squarespace token", "squarespace_key={U}"),
    ("a Strapi secret", "ADMIN_JWT_SECRET={b24}=="),
    ("a Sumo Logic key", "SUMO_ACCESS_KEY={A64}"),
    ("a Travis CI token", "TRAVIS_TOKEN={A22}"),
    ("a Twilio token", "TWILIO_AUTH_TOKEN={h32}"),
    ("a Twitch token", "twitch_secret={l30}"),
    ("a Twitter secret", "TWITTER_API_SECRET={A50}"),
    ("a Twitter secret", "twitter_access_token={d18}-{A40}"),
    ("a Yandex token", "yandex_token={A40}"),
    ("a Zendesk secret", "zendesk_token={A40}"),
    ("an Octopus Deploy key", "octopus_key=\"API-{n26}\""),
    ("a Firebase server key", "FCM_SERVER_KEY=AAAA{w7}:{w140}"),
    ("a password", "password = \"{A12}!\""),
    ("a password", "DB_PASSWORD={A16}"),
    ("a password", "define('DB_PASSWORD', '{A14}');"),
    ("an API key", "const apiKey = '{h32}';"),
    ("an API key", "X-Api-Key: {A32}"),
    ("a secret key", "SECRET_KEY_BASE={h128}"),
    ("a secret", "jwt_secret: \"{A40}\""),
    ("a token", "access_token: {A48}"),
    ("a token", "\"token\": \"{A40}\""),
    ("credentials", "credential=\"{A40}\""),
];

/// All of them: what it is, and a file's content that holds it.
pub(in crate::repository) fn all() -> Vec<(&'static str, String)> {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    SAMPLES
        .iter()
        .map(|(kind, template)| (*kind, dice.fill(template)))
        .collect()
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }

    fn draw(&mut self, alphabet: &str, count: usize) -> String {
        let letters = alphabet.as_bytes();
        let mut text = String::new();
        while text.len() < count {
            // The first ones are drawn until there is a digit, as nearly all real ones have one.
            let letter = char::from(letters[self.roll(letters.len())]);
            if text.len() == 1 && alphabet.contains('7') && !letter.is_ascii_digit() {
                continue;
            }
            text.push(letter);
        }
        text
    }

    fn fill(&mut self, template: &str) -> String {
        const LOWER: &str = "abcdefghijklmnopqrstuvwxyz";
        const UPPER: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
        const DIGITS: &str = "0123456789";
        const HEX: &str = "0123456789abcdef";
        let mut text = String::new();
        let mut rest = template;
        while let Some((before, spec)) = rest.split_once('{') {
            text.push_str(before);
            let end = spec.find('}').filter(|&end| {
                end > 0 && (&spec[..end] == "U" || spec[1..end].parse::<usize>().is_ok())
            });
            let Some(end) = end else {
                text.push('{');
                rest = spec;
                continue;
            };
            let (kind, count) = (&spec[..1], spec[1..end].parse().unwrap_or(0));
            let alphabet = match kind {
                "A" => format!("{LOWER}{UPPER}{DIGITS}"),
                "L" => format!("{LOWER}{UPPER}"),
                "l" => format!("{LOWER}{DIGITS}"),
                "n" => format!("{UPPER}{DIGITS}"),
                "u" => format!("{UPPER}234567"),
                "d" => DIGITS.to_owned(),
                "h" => HEX.to_owned(),
                "w" => format!("{LOWER}{UPPER}{DIGITS}_-"),
                "b" => format!("{LOWER}{UPPER}{DIGITS}+/"),
                "q" => "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L".to_owned(),
                _ => String::new(),
            };
            if kind == "U" {
                let parts = [8, 4, 4, 4, 12].map(|length| self.draw(HEX, length));
                text.push_str(&parts.join("-"));
            } else {
                // Where a sign may stand there is no end to be seen behind one.
                let drawn = self.draw(&alphabet, count);
                let end = if drawn.ends_with(['-', '_', '+', '/']) {
                    "7"
                } else {
                    ""
                };
                text.push_str(&drawn[..count - end.len()]);
                text.push_str(end);
            }
            rest = &spec[end + 1..];
        }
        text + rest + "\n"
    }
}
