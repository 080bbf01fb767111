"""Sentence templates of the demo problems in eight languages.

The sentences only use word forms that a template can select. They are in the present tense, which avoids the gender of
the Russian past tense. They contain no pronouns, except the French one stored with each name, and no elision (no French
de/que before a name). Counts are from 2 to 20, for which Russian needs only the paucal and the plural. Chinese and Thai
nouns are stored with their classifiers, and Swahili nouns with the form of `-ngapi` for their noun class.

Template fields: {a} the name, {x} the noun, {n} a count, {k} the number of boxes, {r} a result, {s} a calculation, and
language-specific fields (see `DemoLanguage`).
"""

from dataclasses import dataclass

NAMES = ("Anna", "Maria", "David", "Peter")
NOUNS = ("apple", "book", "pencil", "ball")
EVENTS = {"buy": 1, "find": 1, "give": -1, "lose": -1}  # 1 if the count grows, -1 if it shrinks


@dataclass(frozen=True)
class DemoLanguage:
    """Word forms and sentence templates of one language.

    Attributes:
        names, nouns: Template fields of each name in `NAMES` and each noun in `NOUNS`. If a noun has the field `few`,
            that is the form after 2, 3 and 4, and `x` is the form after other numbers (Russian).
        has, has_boxes, events, ask: Sentences of the problem, in this order: the start without boxes, the start with
            boxes, the events, what is asked.
        start, in_boxes, after, answer: Sentences of the answer, in this order: the start without boxes, the start with
            boxes, the calculation after each event, the result.
        gap: Text between two sentences.
        box_few, box_many: Values of the field `box` for 2 to 4 boxes and for other numbers.
    """

    names: dict[str, dict[str, str]]
    nouns: dict[str, dict[str, str]]
    has: str
    has_boxes: str
    events: dict[str, str]
    ask: str
    start: str
    in_boxes: str
    after: dict[str, str]
    answer: str
    gap: str = " "
    box_few: str = ""
    box_many: str = ""


def _names(*forms: str) -> dict[str, dict[str, str]]:
    return {name: {"a": form} for name, form in zip(NAMES, forms, strict=True)}


def _nouns(field: str, *forms: tuple[str, str]) -> dict[str, dict[str, str]]:
    return {noun: {"x": form, field: other} for noun, (form, other) in zip(NOUNS, forms, strict=True)}


ENGLISH = DemoLanguage(
    names=_names("Anna", "Maria", "David", "Peter"),
    nouns=_nouns("c", ("apples", ""), ("books", ""), ("pencils", ""), ("balls", "")),
    has="{a} has {n} {x}.",
    has_boxes="{a} has {k} boxes. Each box holds {n} {x}.",
    events={
        "buy": "{a} buys {n} more {x}.",
        "find": "{a} finds {n} {x}.",
        "give": "{a} gives {n} {x} to a friend.",
        "lose": "{a} loses {n} {x}.",
    },
    ask="How many {x} does {a} have now?",
    start="At first: {r}.",
    in_boxes="In the boxes: {k} × {n} = {r}.",
    after={
        "buy": "After the purchase: {s}.",
        "find": "After the find: {s}.",
        "give": "After the gift: {s}.",
        "lose": "After the loss: {s}.",
    },
    answer="The answer is {r}.",
)

SPANISH = DemoLanguage(
    names=_names("Ana", "María", "David", "Pedro"),
    nouns=_nouns("how", ("manzanas", "Cuántas"), ("libros", "Cuántos"), ("lápices", "Cuántos"), ("pelotas", "Cuántas")),
    has="{a} tiene {n} {x}.",
    has_boxes="{a} tiene {k} cajas. En cada caja hay {n} {x}.",
    events={
        "buy": "{a} compra {n} {x} más.",
        "find": "{a} encuentra {n} {x}.",
        "give": "{a} le da {n} {x} a un amigo.",
        "lose": "{a} pierde {n} {x}.",
    },
    ask="¿{how} {x} tiene {a} ahora?",
    start="Al principio: {r}.",
    in_boxes="En las cajas: {k} × {n} = {r}.",
    after={
        "buy": "Tras la compra: {s}.",
        "find": "Tras el hallazgo: {s}.",
        "give": "Tras el regalo: {s}.",
        "lose": "Tras la pérdida: {s}.",
    },
    answer="La respuesta es {r}.",
)

GERMAN = DemoLanguage(
    names=_names("Anna", "Maria", "David", "Peter"),
    nouns=_nouns("c", ("Äpfel", ""), ("Bücher", ""), ("Bleistifte", ""), ("Bälle", "")),
    has="{a} hat {n} {x}.",
    has_boxes="{a} hat {k} Kisten. In jeder Kiste sind {n} {x}.",
    events={
        "buy": "{a} kauft {n} weitere {x}.",
        "find": "{a} findet {n} {x}.",
        "give": "{a} gibt einem Freund {n} {x}.",
        "lose": "{a} verliert {n} {x}.",
    },
    ask="Wie viele {x} hat {a} jetzt?",
    start="Am Anfang: {r}.",
    in_boxes="In den Kisten: {k} × {n} = {r}.",
    after={
        "buy": "Nach dem Kauf: {s}.",
        "find": "Nach dem Fund: {s}.",
        "give": "Nach dem Geschenk: {s}.",
        "lose": "Nach dem Verlust: {s}.",
    },
    answer="Die Antwort ist {r}.",
)

FRENCH = DemoLanguage(
    names={
        "Anna": {"a": "Anne", "he": "elle"},
        "Maria": {"a": "Marie", "he": "elle"},
        "David": {"a": "David", "he": "il"},
        "Peter": {"a": "Pierre", "he": "il"},
    },
    nouns=_nouns("c", ("pommes", ""), ("livres", ""), ("crayons", ""), ("balles", "")),
    has="{a} a {n} {x}.",
    has_boxes="{a} a {k} boîtes. Dans chaque boîte, il y a {n} {x}.",
    events={
        "buy": "{a} achète encore {n} {x}.",
        "find": "{a} trouve {n} {x}.",
        "give": "{a} donne {n} {x} à un ami.",
        "lose": "{a} perd {n} {x}.",
    },
    ask="Combien de {x} {a} a-t-{he} maintenant ?",
    start="Au début : {r}.",
    in_boxes="Dans les boîtes : {k} × {n} = {r}.",
    after={
        "buy": "Après l'achat : {s}.",
        "find": "Après la trouvaille : {s}.",
        "give": "Après le cadeau : {s}.",
        "lose": "Après la perte : {s}.",
    },
    answer="La réponse est {r}.",
)

RUSSIAN = DemoLanguage(
    names={
        "Anna": {"a": "Анна", "of": "Анны"},
        "Maria": {"a": "Мария", "of": "Марии"},
        "David": {"a": "Давид", "of": "Давида"},
        "Peter": {"a": "Пётр", "of": "Петра"},
    },
    nouns=_nouns("few", ("яблок", "яблока"), ("книг", "книги"), ("карандашей", "карандаша"), ("мячей", "мяча")),
    has="У {of} {n} {x}.",
    has_boxes="У {of} {k} {box}. В каждой коробке {n} {x}.",
    events={
        "buy": "{a} покупает ещё {n} {x}.",
        "find": "{a} находит {n} {x}.",
        "give": "{a} отдаёт другу {n} {x}.",
        "lose": "{a} теряет {n} {x}.",
    },
    ask="Сколько {x} теперь у {of}?",
    start="Сначала: {r}.",
    in_boxes="В коробках: {k} × {n} = {r}.",
    after={
        "buy": "После покупки: {s}.",
        "find": "После находки: {s}.",
        "give": "После подарка: {s}.",
        "lose": "После потери: {s}.",
    },
    answer="Ответ: {r}.",
    box_few="коробки",
    box_many="коробок",
)

CHINESE = DemoLanguage(
    names=_names("安娜", "玛丽", "大卫", "彼得"),
    nouns=_nouns("c", ("苹果", "个"), ("书", "本"), ("铅笔", "支"), ("球", "个")),
    has="{a}有{n}{c}{x}。",
    has_boxes="{a}有{k}个盒子。每个盒子里有{n}{c}{x}。",
    events={
        "buy": "{a}又买了{n}{c}{x}。",
        "find": "{a}找到了{n}{c}{x}。",
        "give": "{a}给了朋友{n}{c}{x}。",
        "lose": "{a}丢了{n}{c}{x}。",
    },
    ask="{a}现在有多少{c}{x}？",
    start="开始：{r}。",
    in_boxes="盒子里：{k} × {n} = {r}。",
    after={
        "buy": "买了之后：{s}。",
        "find": "找到之后：{s}。",
        "give": "送出之后：{s}。",
        "lose": "丢了之后：{s}。",
    },
    answer="答案是{r}。",
    gap="",
)

SWAHILI = DemoLanguage(
    names=_names("Anna", "Maria", "Daudi", "Petro"),
    nouns=_nouns("how", ("matufaha", "mangapi"), ("vitabu", "vingapi"), ("penseli", "ngapi"), ("mipira", "mingapi")),
    has="{a} ana {x} {n}.",
    has_boxes="{a} ana masanduku {k}. Kila sanduku lina {x} {n}.",
    events={
        "buy": "{a} ananunua {x} {n} zaidi.",
        "find": "{a} anapata {x} {n}.",
        "give": "{a} anampa rafiki {x} {n}.",
        "lose": "{a} anapoteza {x} {n}.",
    },
    ask="Sasa {a} ana {x} {how}?",
    start="Mwanzoni: {r}.",
    in_boxes="Ndani ya masanduku: {k} × {n} = {r}.",
    after={
        "buy": "Baada ya kununua: {s}.",
        "find": "Baada ya kupata: {s}.",
        "give": "Baada ya kutoa: {s}.",
        "lose": "Baada ya kupoteza: {s}.",
    },
    answer="Jibu ni {r}.",
)

THAI = DemoLanguage(
    names=_names("แอนนา", "มาเรีย", "เดวิด", "ปีเตอร์"),
    nouns=_nouns("c", ("แอปเปิล", "ผล"), ("หนังสือ", "เล่ม"), ("ดินสอ", "แท่ง"), ("ลูกบอล", "ลูก")),
    has="{a}มี{x} {n} {c}",
    has_boxes="{a}มีกล่อง {k} ใบ แต่ละกล่องมี{x} {n} {c}",
    events={
        "buy": "{a}ซื้อ{x}เพิ่มอีก {n} {c}",
        "find": "{a}พบ{x} {n} {c}",
        "give": "{a}ให้{x}แก่เพื่อน {n} {c}",
        "lose": "{a}ทำ{x}หาย {n} {c}",
    },
    ask="ตอนนี้{a}มี{x}กี่{c}",
    start="ตอนแรก: {r}",
    in_boxes="ในกล่อง: {k} × {n} = {r}",
    after={
        "buy": "หลังจากซื้อ: {s}",
        "find": "หลังจากพบ: {s}",
        "give": "หลังจากให้: {s}",
        "lose": "หลังจากทำหาย: {s}",
    },
    answer="คำตอบคือ {r}",
)

DEMO_LANGUAGES: dict[str, DemoLanguage] = {
    "en": ENGLISH,
    "es": SPANISH,
    "de": GERMAN,
    "fr": FRENCH,
    "ru": RUSSIAN,
    "zh": CHINESE,
    "sw": SWAHILI,
    "th": THAI,
}
