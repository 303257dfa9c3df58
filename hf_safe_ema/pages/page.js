// Shows the answers that all chosen filters let through. Reads attributes of this page, writes only `hidden` and a count.
"use strict";
(() => {
  const form = document.querySelector("form.filters");
  if (!form) return;
  const selects = [...form.querySelectorAll("select")];
  const groups = [...document.querySelectorAll(".asked")].map((asked) => [asked, [...asked.querySelectorAll(".answer")]]);
  const update = () => {
    const wanted = selects.filter((select) => select.value !== "").map((select) => [`data-${select.name}`, select.value]);
    let shown = 0;
    for (const [asked, answers] of groups) {
      let some = false;
      for (const answer of answers) {
        const fits = wanted.every(([name, value]) => answer.getAttribute(name) === value);
        answer.hidden = !fits;
        some = some || fits;
        shown += fits;
      }
      asked.hidden = !some;
    }
    form.querySelector("output").textContent = `${shown} shown`;
  };
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update(); // a reloaded page keeps what was chosen
})();
