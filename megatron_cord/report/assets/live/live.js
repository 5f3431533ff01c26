"use strict";
// Looks for news of the run every five seconds while the page is seen. The overview is brought up to date; elsewhere nothing moves under the
// reader, who is told that there is more.

const EVERY = 5000;
const root = document.documentElement;
const news = document.getElementById("news");

// A part keeps what its reader opened, and is left alone while the focus is in it.
const replace = (part, fresh) => {
  if (part.innerHTML === fresh.innerHTML || part.contains(document.activeElement)) return;
  const opened = [...part.querySelectorAll("details")].map((details) => details.open);
  part.replaceChildren(...fresh.childNodes);
  part.querySelectorAll("details").forEach((details, index) => {
    details.open = opened[index] ?? false;
  });
};

const update = async () => {
  const response = await fetch("version");
  const version = await response.json();
  if (version === root.dataset.version) return;
  const page = await (await fetch("./")).text();
  const fresh = new DOMParser().parseFromString(page, "text/html");
  for (const part of document.querySelectorAll("[data-news]")) {
    const other = fresh.getElementById(part.id);
    if (other && (root.dataset.view === "overview" || part.id === "facts")) replace(part, other);
  }
  root.dataset.version = fresh.documentElement.dataset.version;
  if (root.dataset.view === "overview") news.textContent = `Brought up to date at ${new Date().toLocaleTimeString()}.`;
  else if (root.dataset.view !== "error") news.textContent = "The run has gone on since this was drawn; Show draws it again.";
};

let lost = false;
const look = async () => {
  if (document.hidden) return;
  try {
    await update();
    if (lost) news.textContent = "";
    lost = false;
  } catch {
    lost = true;
    news.textContent = "The server does not answer; the page shows what was there before.";
  }
};
if (root.dataset.version) setInterval(look, EVERY);
