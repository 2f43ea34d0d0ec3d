// Says in a line at the foot of the page that something is broken, instead of covering the page
// with Vite's overlay; goes away, or loads the page again, once it is mended.
(() => {
  const isOld = document.currentScript.hasAttribute("data-last-good");
  let bar;
  const text = (status) => {
    const error = status.errors[status.errors.length - 1];
    const place = error?.file ? `${error.file}${error.line ? `:${error.line}` : ""} ` : "";
    const what = (error?.message ?? "").split("\n").slice(0, 3).join(" ").slice(0, 400);
    const head = isOld
      ? "This page has a problem. You see it as it was before."
      : "The site has a problem.";
    return `${head} ${place}${what}`.trim();
  };
  const show = (words) => {
    if (!bar) {
      bar = document.createElement("div");
      bar.id = "greenroom-banner";
      bar.setAttribute("role", "status");
      // By property: a site's policy may forbid styles in text.
      Object.assign(bar.style, {
        all: "initial",
        position: "fixed",
        insetInline: "0",
        bottom: "0",
        zIndex: "2147483647",
        padding: "8px 16px",
        font: "14px/1.4 system-ui, sans-serif",
        color: "#fff",
        background: "#7c2d12",
        overflowWrap: "anywhere",
        maxHeight: "30vh",
        overflowY: "auto",
      });
      document.body.append(bar);
    }
    if (bar.textContent !== words) bar.textContent = words;
  };
  // A page that stays broken though no error is known is tried less and less often.
  const key = "greenroom-tries";
  const tries = isOld ? Number(sessionStorage.getItem(key) ?? 0) : 0;
  sessionStorage.setItem(key, String(isOld ? tries + 1 : 0));
  const patience = 2 ** Math.min(tries, 6) + 1;
  let isAsking = false;
  let calm = 0;
  const ask = async () => {
    isAsking = true;
    try {
      const answer = await fetch("/__greenroom/status", { cache: "no-store" });
      const status = await answer.json();
      if (status.state === "error") {
        calm = 0;
        show(text(status));
      } else if (status.state !== "live" && status.state !== "stale") {
        calm = 0;
      } else if (++calm > patience) {
        // An error is told a moment after the page that met it.
        if (isOld) return location.reload();
        bar?.remove();
        bar = undefined;
        isAsking = false;
        return;
      }
    } catch {
      // The connection is away for a moment.
    }
    setTimeout(ask, document.visibilityState === "visible" ? 700 : 5000);
  };
  const begin = () => {
    calm = 0;
    if (!isAsking) ask();
  };
  const hide = () => {
    for (const overlay of document.querySelectorAll("vite-error-overlay")) {
      if (overlay.style.display !== "none") {
        overlay.style.display = "none";
        begin();
      }
    }
  };
  new MutationObserver(hide).observe(document.documentElement, { childList: true });
  new MutationObserver(hide).observe(document.body, { childList: true });
  hide();
  if (isOld) {
    show(text({ errors: [] }));
    begin();
  }
})();
