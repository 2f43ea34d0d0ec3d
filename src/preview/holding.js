// Follows the preview's state and turns this page into the site once it is live.
(() => {
  const progress = document.getElementById("progress");
  const errors = document.getElementById("errors");
  const heading = document.getElementById("heading");
  let wait = 300;
  const show = (status) => {
    const broken = status.state === "error";
    document.body.dataset.state = status.state;
    heading.textContent = broken ? "The preview has a problem" : "Your preview is on its way";
    // Only what changed is written, so that a screen reader says it once.
    if (progress.textContent !== status.progress) progress.textContent = status.progress;
    const text = status.errors
      .map((e) => (e.file ? `${e.file}${e.line ? `:${e.line}` : ""}\n` : "") + e.message)
      .join("\n\n");
    if (errors.textContent !== text) errors.textContent = text;
    errors.hidden = text === "";
  };
  const ask = async () => {
    try {
      const answer = await fetch("/__greenroom/status", { cache: "no-store" });
      if (answer.ok) {
        const status = await answer.json();
        if (status.state === "live" || status.state === "stale") return location.reload();
        show(status);
      }
    } catch {
      // The connection is away for a moment: ask again.
    }
    wait = Math.min(wait * 1.3, 2000);
    setTimeout(ask, wait);
  };
  setTimeout(ask, wait);
})();
