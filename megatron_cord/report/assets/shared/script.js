"use strict";
// The page reads without this script; with it one can filter, walk along tokens, hear one clip at a time, and choose dark or light.

const form = document.getElementById("filter");
if (form) {
  const cards = [...document.querySelectorAll(".card[data-kind]")];
  const shown = document.getElementById("shown");
  const filter = () => {
    const { kind, voice, text } = Object.fromEntries(new FormData(form));
    const needle = text.trim().toLowerCase();
    let count = 0;
    for (const card of cards) {
      const { dataset } = card;
      card.hidden = Boolean(
        (kind && dataset.kind !== kind) || (voice && dataset.voice !== voice) || !dataset.text.includes(needle),
      );
      if (!card.hidden) count += 1;
      else card.querySelector("audio")?.pause();
    }
    shown.textContent = count ? `${count} shown` : "no question matches";
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
}

// An answer is one stop of the Tab key; the arrow keys move between its tokens.
const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
document.addEventListener("keydown", (event) => {
  const token = event.target.closest(".tokens li");
  if (!token || !(event.key in moves)) return;
  const tokens = [...token.parentElement.children];
  const goal = tokens.indexOf(token) + moves[event.key];
  const next = tokens[Math.min(Math.max(goal, 0), tokens.length - 1)];
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
});

// What is said of a token must not stick out of the window.
const place = ({ target }) => {
  const token = target.closest?.(".tokens li");
  token?.classList.toggle("late", token.getBoundingClientRect().left > innerWidth - 220);
};
document.addEventListener("pointerover", place);
document.addEventListener("focusin", place);

for (const choice of document.querySelectorAll(".colour")) {
  choice.hidden = false;
  choice.addEventListener("change", ({ target }) => {
    document.documentElement.dataset.colour = target.value;
  });
}

document.addEventListener(
  "play",
  (event) => {
    for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
  },
  true,
);

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
const label = () => {
  theme.textContent = isDark() ? "Light mode" : "Dark mode";
};
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  label();
});
dark.addEventListener("change", label);
theme.hidden = false;
label();
