// Enhancements only: every page works without this script.
"use strict";

// Show the meaning of a text while it is typed.
for (const field of document.querySelectorAll("[data-understood]")) {
  const form = field.form;
  const output = document.getElementById("addresses-understood");
  let waiting = 0;
  let asked = 0;
  const show = async () => {
    const mine = ++asked;
    const text = field.value;
    form.elements.seen.value = "";
    if (!text.trim()) {
      output.textContent = "";
      return;
    }
    const body = new URLSearchParams({ token: form.elements.token.value, addresses: text });
    try {
      const answer = await fetch(field.dataset.understood, { method: "POST", body });
      if (!answer.ok || mine !== asked) return;
      const found = await answer.json();
      // An unfinished address is always wrong: show the problem only when the typing stops.
      if (found.problem && document.activeElement === field) {
        await new Promise((resolve) => setTimeout(resolve, 900));
        if (mine !== asked) return;
      }
      output.textContent =
        found.problem || `Understood as ${found.understood}${found.hint && `. ${found.hint}`}`;
      output.classList.toggle("doubt", Boolean(found.problem || found.hint));
      form.elements.seen.value = found.canonical;
    } catch {
      output.textContent = "";
    }
  };
  field.addEventListener("input", () => {
    asked += 1;
    form.elements.seen.value = "";
    clearTimeout(waiting);
    waiting = setTimeout(show, 300);
  });
  for (const button of form.querySelectorAll("[data-mine]")) {
    button.addEventListener("click", (event) => {
      event.preventDefault();
      const typed = field.value.trim();
      if (!typed.split(/[\s,;]+/).includes(button.dataset.mine)) {
        field.value = `${typed}${typed && "\n"}${button.dataset.mine}`;
      }
      field.focus();
      show();
    });
  }
  if (field.value && !field.hasAttribute("aria-invalid")) show();
}

// Count down to a time. Only the difference is used, because clocks differ.
for (const part of document.querySelectorAll("[data-until]")) {
  const opened = performance.now();
  const given = Date.parse(part.dataset.until) - Date.parse(part.dataset.now);
  const tick = () => {
    const left = Math.ceil((given - (performance.now() - opened)) / 1000);
    if (left <= 0) {
      part.textContent = part.dataset.over;
      return;
    }
    const [size, unit] = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]].find(
      ([each]) => left > each || each === 1,
    );
    const count = Math.ceil(left / size);
    part.textContent = `${count} ${unit}${count === 1 ? "" : "s"} left`;
    setTimeout(tick, 1000);
  };
  tick();
}

// Ignore double clicks. Later clicks submit again, because the user may have stopped the browser.
for (const form of document.querySelectorAll("form")) {
  let sent = -Infinity;
  form.addEventListener("submit", (event) => {
    if (event.timeStamp - sent < 1000) event.preventDefault();
    else sent = event.timeStamp;
  });
}
