"use strict";
// Unfolds what a link leads to, and shows both sides of a region when one is pointed at. The page works without it.
function unfold(element) {
  for (let one = element; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
}
function reveal(element) {
  if (!element) return;
  unfold(element);
  element.scrollIntoView({ block: "center" });
  element.classList.add("found");
  setTimeout(() => element.classList.remove("found"), 2500);
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-unfold], button[data-fold]");
  if (button) {
    const open = "unfold" in button.dataset;
    const groups = document.querySelectorAll((button.dataset.unfold || button.dataset.fold) + " details.group");
    groups.forEach((group, index) => { group.open = open || index === 0; });
    return;
  }
  const link = event.target.closest("a[href^='#']");
  if (!link) return;
  const region = link.dataset.region;
  const target = region === undefined
    ? document.getElementById(link.getAttribute("href").slice(1))
    : document.querySelector(`details.region[data-region="${CSS.escape(region)}"]`);
  if (!target || target.tagName === "SECTION") return;
  event.preventDefault();
  reveal(target);
});
function light(event, on) {
  const part = event.target.closest && event.target.closest("#graph [data-region]");
  if (!part) return;
  const same = `#graph [data-region="${CSS.escape(part.dataset.region)}"]`;
  document.querySelectorAll(same).forEach((one) => one.classList.toggle("lit", on));
}
document.addEventListener("mouseover", (event) => light(event, true));
document.addEventListener("mouseout", (event) => light(event, false));
addEventListener("beforeprint", () => document.querySelectorAll("details.figures").forEach((one) => { one.open = true; }));
