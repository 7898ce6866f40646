// Ratings and edits as rows that `arriero dpo` and `arriero sft` take as they are.
//
// A preference is an answer that was called good, or was edited, against one that was called bad, to the same prompt:
// of models side by side, of an answer and an earlier one, of an edit and what it was made of. A good answer is a row
// for fine-tuning.

function prompts(conversation, turn, answer) {
  const said = conversation.settings.system ? [{ role: "system", content: conversation.settings.system }] : [];
  for (const before of conversation.turns.slice(0, conversation.turns.indexOf(turn))) {
    said.push({ role: "user", content: before.question });
    const spoken = before.answers.find((each) => each.model === answer.model) ?? before.answers[0];
    if (spoken) said.push({ role: "assistant", content: spoken.text });
  }
  return [...said, { role: "user", content: turn.question }];
}

function* rated(conversations) {
  for (const conversation of conversations)
    for (const turn of conversation.turns) {
      const all = [...turn.answers, ...(turn.earlier ?? [])].filter((each) => each.text.trim());
      yield { conversation, turn, good: all.filter((each) => each.rating > 0), bad: all.filter((each) => each.rating < 0) };
    }
}

export function preferenceRows(conversations) {
  const rows = [];
  for (const { conversation, turn, good, bad } of rated(conversations))
    for (const chosen of good)
      for (const rejected of bad) {
        const prompt = prompts(conversation, turn, chosen);
        if (chosen.text === rejected.text || JSON.stringify(prompt) !== JSON.stringify(prompts(conversation, turn, rejected))) continue;
        rows.push({ prompt, chosen: [{ role: "assistant", content: chosen.text }], rejected: [{ role: "assistant", content: rejected.text }] });
      }
  return rows;
}

export function sftRows(conversations) {
  const rows = [];
  for (const { conversation, turn, good } of rated(conversations))
    for (const answer of good) rows.push({ messages: [...prompts(conversation, turn, answer), { role: "assistant", content: answer.text }] });
  return rows;
}
