"use strict";
for (const form of document.querySelectorAll("form.filter")) {
  const answers = [...form.parentElement.querySelectorAll(".answer")];
  const rest = form.parentElement.querySelector("details.rest");
  const said = form.querySelector("output");
  const choose = () => {
    const words = form.elements.words.value.toLowerCase();
    const state = form.elements.state.value;
    let shown = 0;
    for (const answer of answers) {
      const fits = (!state || answer.dataset.state === state) && answer.textContent.toLowerCase().includes(words);
      answer.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    if (rest && (words || state)) rest.open = true;
    said.textContent = `${shown} of ${answers.length}`;
  };
  form.addEventListener("input", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  choose();
}
