// Says that a person has this page before them: while it is visible, now and every 30 s. A page
// that should hear of changes and has been deaf for a while is loaded again, once a minute at most.
(() => {
  const hears = document.querySelector('script[src*="/@vite/client"]') ? "1" : "0";
  const again = () => {
    const last = Number(sessionStorage.getItem("greenroom-loaded-again") ?? 0);
    if (Date.now() - last < 60000) return;
    sessionStorage.setItem("greenroom-loaded-again", String(Date.now()));
    location.reload();
  };
  const say = () => {
    if (document.visibilityState === "visible") {
      fetch("/__greenroom/presence", {
        method: "POST",
        keepalive: true,
        headers: { "x-greenroom-hears": hears },
      })
        .then((answer) => answer.status === 205 && again())
        .catch(() => {});
    }
  };
  document.addEventListener("visibilitychange", say);
  setInterval(say, 30000);
  say();
})();
