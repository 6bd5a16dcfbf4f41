"""Chats through the chat template: the prompt that a model is asked, and the whole conversation.

In: examples that are chats.  Out: rendered texts, and where in the whole conversation the response
begins. The response is what follows the prompt in it; it is never rendered or tokenised by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date, datetime, time
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from distill_system.config.data import DataConfig
from distill_system.data.chat_forms import find_loss, forms
from distill_system.data.encoding import Encoded, Text, TextEncoder
from distill_system.data.examples import Example
from distill_system.data.messages import Message, Messages, Tool, message_text, part_texts
from distill_system.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER_ANSWER = "\U0010fff4"  # begins as no answer does


class Conversation(NamedTuple):
    """A chat with its answer.

    text: all of it.  start: the character of `text.encoded` at which the response begins.
    prompt: what a model is asked for it.
    """

    text: Text
    start: int
    prompt: Text

    @property
    def begins_with_prompt(self) -> bool:
        """Whether the prompt is asked as it stands in the conversation."""
        return self.text.encoded.startswith(self.prompt.encoded)


class ChatRenderer:
    """Renders chats with the run's chat template.

    encoder: knows the control tokens that rows may not write.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, encoder: TextEncoder
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._name = data.chat_template_name
        day = datetime.combine(data.chat_date or date.today(), time())
        self._values: dict[str, Any] = {
            **tokenizer.special_tokens_map,
            "strftime_now": day.strftime,
            **data.chat_template_kwargs,
        }

    def prompt(self, example: Example, where: str) -> Text:
        """What a model is asked: the conversation before the answer, and the answer's opening."""
        chat = self._read(example, where)
        messages = self._fit(chat, [*chat.context], where, ask=True)
        return chat.text(self._render(messages, chat.tools, where, ask=True))

    def conversation(self, example: Example, where: str) -> Conversation:
        """The whole conversation, of which the response is what follows the prompt.

        Raises: DataError if the template refuses it, loses a part of it, or writes what is before
            the answer otherwise once the answer is there.
        """
        chat = self._read(example, where)
        assert chat.reply is not None, "only a chat with an answer is a conversation"
        messages = self._fit(chat, [*chat.context, chat.reply], where, ask=False)
        whole, block = self._render_marked(messages, chat, where)
        asked = chat.text(self._render(messages[:-1], chat.tools, where, ask=True))
        start = self._find_start(chat, messages, whole, asked, where)
        return Conversation(whole, max(start, block or 0), asked)

    def _read(self, example: Example, where: str) -> _Chat:
        """The messages of an example, with stand-ins for control tokens that they spell."""
        context, reply, tools = [*_context(example)], _reply(example), [*example.tools]
        messages = [*context, *([reply] if reply else [])]
        joined = ["".join(part_texts(message.get("content"))) for message in messages]
        if not self._encoder.spells_control([messages, tools, joined]):
            return _Chat(context, reply, tools, None)
        context = [self._hidden(message, where) for message in context]
        reply = self._hidden(reply, where) if reply else None
        return _Chat(context, reply, self._encoder.hide(tools, where), self._encoder)

    def _hidden(self, message: Message, where: str) -> Message:
        """A message without control tokens; one that its parts spell together makes them one."""
        text = "".join(texts := part_texts(message.get("content")))
        if self._encoder.spells_control(text) and len(texts) > 1:
            message = {**message, "content": [{"type": "text", "text": text}]}
        return {key: self._encoder.hide(value, where) for key, value in message.items()}

    def _fit(self, chat: _Chat, messages: list[Message], where: str, *, ask: bool) -> list[Message]:
        """The first form of the messages that the template renders without loss."""
        failures: list[str] = []
        for form in forms(messages):
            try:
                rendered = self._render(form, chat.tools, where, ask=ask)
            except DataError as error:
                failures.append(str(error))
                continue
            loss = find_loss(form, chat.tools, rendered)
            if loss is None:
                return form
            failures.append(
                f"{where}: the chat template loses a part of the row: {loss}. Give a template that "
                "renders it (data.chat_template), or leave it out of the row"
            )
        raise DataError(failures[0])

    def _find_start(
        self, chat: _Chat, messages: list[Message], whole: Text, asked: Text, where: str
    ) -> int:
        if whole.encoded.startswith(asked.encoded):
            return len(asked.encoded)
        # The prompt opens the answer otherwise than the conversation does, as where it closes an
        # empty block of thoughts. The response begins where they part, but not behind the point
        # from which on the conversation depends on the answer: they may go on alike by chance.
        before = chat.text(self._render(messages[:-1], chat.tools, where, ask=False))
        other: list[Message] = [*messages[:-1], {"role": "assistant", "content": _OTHER_ANSWER}]
        opened = chat.text(self._render(other, chat.tools, where, ask=False))
        shared = _shared(whole.encoded, asked.encoded)
        answer_begins = _shared(before.encoded, asked.encoded)
        if shared < len(asked.encoded[:answer_begins].rstrip()):
            raise DataError(
                f"{where}: the chat template writes the conversation before the answer otherwise "
                "once the answer is there, so that nothing says where the response begins: "
                f"{asked.plain[shared:][:60]!r} against {whole.plain[shared:][:60]!r}. Give a "
                "template whose conversations begin with their prompts (data.chat_template)"
            )
        return min(shared, _shared(whole.encoded, opened.encoded))

    def _render_marked(
        self, messages: list[Message], chat: _Chat, where: str
    ) -> tuple[Text, int | None]:
        """The conversation, and where the template says that its last answer begins."""
        template = self._template(chat.tools, where)
        if not _GENERATION.search(template):
            return chat.text(self._render(messages, chat.tools, where, ask=False)), None
        texts, blocks = self._call(
            render_jinja_template,
            where,
            conversations=[messages],
            tools=chat.tools or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._values,
        )
        turns = sum(message["role"] == "assistant" for message in messages)
        if len(blocks[0]) != turns:  # more than one block a turn, or turns without one
            return chat.text(texts[0]), None
        begin = blocks[0][-1][0]
        return chat.text(texts[0]), len(chat.text(texts[0][:begin]).encoded)

    def _render(
        self, messages: Sequence[Message], tools: list[Tool], where: str, *, ask: bool
    ) -> str:
        rendered: str = self._call(
            self._tokenizer.apply_chat_template,
            where,
            conversation=messages,
            tools=tools or None,
            chat_template=self._name,
            add_generation_prompt=ask,
            tokenize=False,
            **self._values,
        )
        return rendered

    def _template(self, tools: list[Tool], where: str) -> str:
        template: str = self._call(
            self._tokenizer.get_chat_template, where, chat_template=self._name, tools=tools or None
        )
        return template

    def _call(self, function: Any, where: str, **arguments: Any) -> Any:
        self._check_template(where)
        try:
            return function(**arguments)
        except Exception as error:  # a template is a program: it may raise anything
            raise DataError(
                f"{where}: the chat template refused the messages: {type(error).__name__}: {error}"
            ) from error

    def _check_template(self, where: str) -> None:
        templates = self._tokenizer.chat_template
        if templates is None:
            raise DataError(
                f"{where}: a chat needs a chat template and the tokenizer has none; give one "
                "(data.chat_template), use rows of prompt and response with "
                "data.use_chat_template=false, or a tokenizer that has one"
            )
        named = templates if isinstance(templates, dict) else {}
        if self._name is not None and self._name not in named:
            raise DataError(
                f"data.chat_template_name={self._name!r}: the tokenizer has no chat template of "
                f"this name; it has {sorted(named) or 'one without a name: set the key to null'}"
            )
        if named and self._name is None and "default" not in named:
            raise DataError(
                f"{where}: the tokenizer has several chat templates, {sorted(named)}, and none of "
                "them is the default; choose one with data.chat_template_name"
            )


class _Chat(NamedTuple):
    """A chat as it is rendered.  hidden: knows its stand-ins; None where it has none."""

    context: list[Message]
    reply: Message | None
    tools: list[Tool]
    hidden: TextEncoder | None

    def text(self, rendered: str) -> Text:
        """What the template made of it."""
        return Text(rendered) if self.hidden is None else self.hidden.show(rendered)


def _context(example: Example) -> Messages:
    """The messages before the answer."""
    prompt = example.prompt
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def after_context(example: Example, text: str, shown: Sequence[Example]) -> Messages:
    """A chat behind a text, which begins its system message, and behind the turns of others."""
    messages, system = [*_context(example)], list[Message]()
    if messages[0]["role"] == "system":
        system.append(messages.pop(0))
    if text:
        own = [message_text(message) for message in system]
        system = [{"role": "system", "content": "\n\n".join([text, *own])}]
    turns = [turn for each in shown for turn in (*_context(each), _reply(each)) if turn]
    return (*system, *(turn for turn in turns if turn["role"] != "system"), *messages)


def _reply(example: Example) -> Message | None:
    """The answer as a message, if the row has one."""
    if example.reply is not None or example.answer is None:
        return example.reply
    return {"role": "assistant", "content": example.answer}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def split_tokens(
    conversation: Conversation, whole: Encoded, asked: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the response.

    whole: the conversation's tokens.  asked: the tokens of the prompt as a model is asked it. Where
    the conversation begins with them, they are the prompt. Otherwise a token that holds characters
    of both belongs to the response; the response of a tokenizer that does not say which characters
    a token holds follows what both share.
    """
    count = shared = _shared(whole.ids, asked)
    is_begun = shared == len(asked) and conversation.start == len(conversation.prompt.encoded)
    if whole.ends and not is_begun:
        ends = enumerate(whole.ends)
        count = next((n for n, end in ends if end > conversation.start), len(whole.ids))
    return whole.ids[:count], whole.ids[count:]
