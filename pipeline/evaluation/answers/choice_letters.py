"""The letters that number options, A to J, in the scripts of the world."""

import unicodedata

# Ten letters (fewer if the custom has fewer), in the order in which exams use them.
LETTERS = {
    "Latin": "ABCDEFGHIJ",
    "Greek": "ΑΒΓΔΕΣΖΗΘΙ",
    "Cyrillic": "АБВГДЕЖЗИК",
    "Hebrew": "אבגדהוזחטי",
    "Arabic, abjad": "أبجدهوزحطي",
    "Devanagari": "कखगघङचछजझञ",
    "Devanagari, अ ब स द": "अबसद",
    "Devanagari, vowels": "अआइई",
    "Bengali": "কখগঘঙচছজঝঞ",
    "Gurmukhi": "ਕਖਗਘਙਚਛਜਝਞ",
    "Gujarati": "કખગઘઙચછજઝઞ",
    "Odia": "କଖଗଘଙଚଛଜଝଞ",
    "Tamil": "அஆஇஈஉஊஎஏஐஒ",
    "Telugu": "అఆఇఈఉఊఎఏఐఒ",
    "Telugu, consonants": "కఖగఘఙచఛజఝఞ",
    "Kannada": "ಅಆಇಈಉಊಎಏಐಒ",
    "Kannada, consonants": "ಕಖಗಘಙಚಛಜಝಞ",
    "Malayalam": "അആഇഈഉഊഎഏഐഒ",
    "Malayalam, consonants": "കഖഗഘങചഛജഝഞ",
    "Sinhala": "අආඇඈඉඊඋඌඑඒ",
    "Thai": "กขคงจฉชซฌญ",
    "Lao": "ກຂຄງຈສຊຍດຕ",
    "Khmer": "កខគឃងចឆជឈញ",
    "Burmese": "ကခဂဃငစဆဇဈည",
    "Tibetan": "ཀཁགངཅཆཇཉཏཐ",
    "Georgian": "აბგდევზთიკ",
    "Armenian": "ԱԲԳԴԵԶԷԸԹԺ",
    "Ethiopic": "ሀለሐመሠረሰሸቀበ",
    "Hangul, syllables": "가나다라마바사아자차",
    "Hangul, consonants": "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊ",
    "Katakana": "アイウエオカキクケコ",
    "Hiragana": "あいうえおかきくけこ",
    "Han": "甲乙丙丁戊己庚辛壬癸",
}
# Letters of one language that differ from those of its script. Persian, Urdu and others write the first as a word.
LANGUAGE_LETTERS = {
    "fa": {"الف": 0, "پ": 2, "ت": 3, "ث": 4},
    "ur": {"الف": 0, "اے": 0, "بی": 1, "سی": 2, "ڈی": 3},
    "ar": {"ا": 0, "ألف": 0, "باء": 1, "جيم": 2, "دال": 3, "هـ": 4},
    "ps": {"الف": 0},
    "hi": {"ए": 0, "बी": 1, "सी": 2, "डी": 3},
}
INDEX = {letter: index for letters in LETTERS.values() for index, letter in enumerate(letters)}
# What a letter is followed by if it is a word of a sentence: particles and copulas that are written together with it.
SUFFIXES = r"(?:입니다|이다|이에요|예요|번|です|だ|である|になります|'?[dt][ıiuü]r|项|項|选项)"


def letter_indices(lang: str, count: int) -> dict[str, int]:
    """Return the index of each letter, circled digit or letter that may name one of `count` options in a language."""
    names = INDEX | LANGUAGE_LETTERS.get(lang, {})
    names |= {unicodedata.normalize("NFC", name): index for name, index in names.items()}
    for index in range(count):
        names[chr(0x2460 + index)] = index  # ① to ⑩
        names[chr(0x24B6 + index)] = index  # Ⓐ to Ⓙ
        names[chr(0xFF21 + index)] = index  # Ａ to Ｊ
    return {name: index for name, index in names.items() if index < count}
