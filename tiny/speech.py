"""Training sound for the tiny model: synthetic speech in many voices and languages, and its augmentation.

    python -m tiny.speech data/speech [--hours 1.5] [--seed 0]

needs the program espeak-ng and writes data/speech/train/*.ogg and data/speech/held_out/*.ogg, 16 kHz mono, 20 to 60 s long, one voice each,
named LANGUAGE_VOICE_NUMBER.ogg. The sentences are put together from the word lists below. Never in train: the voices HELD_OUT_VOICES, the
language HELD_OUT_LANGUAGE, and every sentence whose words have a checksum that is a multiple of 8, whatever the seed; held_out has nothing else.

There are no labels: the mouth is computed from the augmented sound (faces.articulation).

Axes    n sounds in a batch
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import io
import random
import re
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from fast.probe import any_terminal
from media.sound import RATE, load_audio

VOICES = ("m1 m2 m3 m4 m6 m7 f1 f2 f4 f5 Alex Andy Annie Alicia Andrea Diogo Gene Henrique Hugo Jacky Lee Mario Michael Nguyen "
          "adam anika belinda benjamin david ed grandpa iven john linda max michel miguel norbert pablo paul pedro quincy rob shelby "
          "steph steph3 travis whisper zac klatt2 klatt4").split()         # steph3 is nearly steph
HELD_OUT_VOICES = "m5 m8 f3 victor grandma Marco robert aunty edward sandro caleb".split()
HELD_OUT_LANGUAGE = "it"
HELD_OUT_FILES = 48          # of them every fourth in the held-out language
LONG_FILES = 4               # held-out files of nearly a minute, for videos of ten clips
PAUSE = (0.2, 1.5)           # seconds between two sentences
COMPRESSION = 0.8            # of Vorbis, 0 to 1: about 4.5 kB a second
INSTALL = "espeak-ng is not installed: apt install espeak-ng, dnf install espeak-ng or brew install espeak-ng"

# ---- texts: templates and the words that fill them ------------------------------------------------------------------------------------
# A template names lists by single capital letters, N is a number up to 999. Every word of a list fits all templates of its language.

ENGLISH = (
    "A B C.|A B C D.|D, A B C.|Did you know that A B C?|A B C, and A B C.|I think A B C D.|E!|E.|E, A B C.|Please wait N minutes.|"
    "The number is N, not N.|We counted N birds and N boats.",
    dict(A="my sister|the old teacher|our neighbour|a young painter|the doctor|her brother|the pilot|a small boy|the whole family|his aunt",
         B="found|bought|forgot|wanted to see|talked about|was looking for|gave away|remembered|painted|never liked",
         C="a blue bicycle|the garden by the lake|seven yellow apples|an open window|the long letter|a strange machine|"
           "warm bread and butter|"
           "the picture of a ship|some music from home|a map of the mountains|five woolly sheep|the evening paper",
         D="in the morning|after the rain|before breakfast|on the way to school|last summer|every single day|"
           "when nobody was there|at the station",
         E="good evening|thank you very much|what a lovely voice|well, maybe|that is wonderful|no, not today|excuse me|how are you"))

TEXTS = {                    # voice name of espeak-ng -> (templates, {letter: words})
    "en-us": ENGLISH, "en-gb": ENGLISH, "en-gb-scotland": ENGLISH,
    "cmn-latn-pinyin": (     # Mandarin in pinyin with tone numbers, which every build of espeak-ng reads
        "A B C.|D A B C.|A D B C.|E!|E.|E, A B C.|A B N ge4 F.|zhe4 shi4 di4 N hao4.|A B C, A ye3 B C.|ni3 zhi1dao4 A B C ma5?",
        dict(A="wo3 mei4mei5|ta1|lao3shi1|wo3men5|na4 wei4 yi1sheng1|lin2ju1|xiao3 peng2you3|ta1 de5 ge1ge5|ma1ma5|nian2qing1 de5 hua4jia1",
             B="kan4jian4 le5|mai3 le5|xi3huan1|xiang3yao4|wang4ji4 le5|zhao3dao4 le5|dai4lai2 le5|tan2dao4 le5",
             C="lan2se4 de5 zi4xing2che1|hu2bian1 de5 hua1yuan2|hao3chi1 de5 mian4bao1|yi4 feng1 chang2 xin4|chuan2 de5 zhao4pian4|"
               "jia1xiang1 de5 yin1yue4|kai1zhe5 de5 chuang1hu5|gao1shan1 he2 da4hai3|jin1tian1 de5 bao4zhi3",
             D="jin1tian1 zao3shang5|xia4yu3 yi3hou4|qu4nian2 xia4tian1|mei3 tian1|zai4 huo3che1zhan4|zuo2tian1 wan3shang5",
             E="ni3 hao3|xie4xie5 ni3|zai4jian4|zhen1 de5 ma5|mei2 guan1xi5|tai4 hao3 le5|dui4bu5qi3|qing3 deng3 yi1xia4",
             F="ping2guo3|ji1dan4|xiao3 niao3|hai2zi5|ben3zi5|yi3zi5")),
    "ja": (
        "A C B。|D、A C B。|A D C B。|E!|E。|E、A C B。|ばんごうは N です。|えきまで N メートルです。|A C B、それから C B。|A C B か。",
        dict(A="わたしのいもうとは|せんせいは|となりのひとは|わかいえかきは|おいしゃさんは|あのおとこのこは|おかあさんは|ぼくたちは|かれのおばさんは",
             B="みつけました|かいました|わすれました|さがしています|おもいだしました|かきました|すきです|ほしいです|みせました",
             C="あおいじてんしゃを|みずうみのそばのにわを|きいろいりんごを|ながいてがみを|ふるいきかいを|あたたかいパンを|ふねのえを|ふるさとのおんがくを|"
               "やまのちずを|ゆうがたのしんぶんを|あいているまどを",
             D="けさ|あめのあとで|きょねんのなつ|まいにち|えきのまえで|ゆうべ|だれもいないとき|あさごはんのまえに",
             E="おはようございます|ありがとうございます|こんばんは|ほんとうですか|すみません|それはすばらしい|いいえ、ちがいます|おげんきですか")),
    "de": (
        "A B C.|D B A C.|A B D C.|E!|E.|E, A B C.|Die Nummer lautet N, nicht N.|Wir zählten N Vögel.|A B C, und A B C.|Stimmt es, A B C?",
        dict(A="meine Schwester|der alte Lehrer|unser Nachbar|eine junge Malerin|die Ärztin|ihr Bruder|der Pilot|"
               "ein kleines Mädchen|die Großmutter",
             B="fand|kaufte|vergaß|suchte|wollte|zeichnete|verschenkte|beschrieb|mochte",
             C="ein blaues Fahrrad|den Garten am See|sieben gelbe Äpfel|das offene Fenster|den langen Brief|"
               "eine seltsame Maschine|warmes Brot|"
               "das Bild eines Schiffes|Musik von früher|eine Karte der Berge|die Abendzeitung",
             D="am Morgen|nach dem Regen|vor dem Frühstück|auf dem Schulweg|im letzten Sommer|jeden Tag|am Bahnhof|gestern Abend",
             E="guten Abend|vielen Dank|was für eine schöne Stimme|na ja, vielleicht|das ist wunderbar|nein, heute nicht|"
               "Entschuldigung|wie geht es")),
    "fr-fr": (
        "A B C.|D, A B C.|A B C D.|E!|E.|E, A B C.|Le numéro est N, pas N.|Nous avons compté N oiseaux.|A B C, et A B C.|Est-ce que A B C?",
        dict(A="ma sœur|le vieux professeur|notre voisin|une jeune artiste|le médecin|son frère|le pilote|un petit garçon|"
               "la famille|sa tante",
             B="a trouvé|a acheté|a oublié|cherchait|voulait voir|a dessiné|a donné|racontait|n'aimait pas",
             C="un vélo bleu|le jardin près du lac|sept pommes jaunes|la fenêtre ouverte|une longue lettre|une machine étrange|"
               "du pain chaud|"
               "l'image d'un bateau|la musique du pays|une carte des montagnes|le journal du soir",
             D="le matin|après la pluie|avant le déjeuner|sur le chemin de l'école|l'été dernier|tous les jours|à la gare|hier soir",
             E="bonsoir|merci beaucoup|quelle belle voix|eh bien, peut-être|c'est merveilleux|non, pas aujourd'hui|pardon|"
               "comment allez-vous")),
    "es": (
        "A B C.|D, A B C.|A B C D.|E!|E.|E, A B C.|El número es N, no N.|Contamos N pájaros.|A B C, y A B C.|¿Es verdad que A B C?",
        dict(A="mi hermana|el viejo profesor|nuestro vecino|una joven pintora|la doctora|su hermano|el piloto|un niño pequeño|"
               "toda la familia",
             B="encontró|compró|olvidó|buscaba|quería ver|dibujó|regaló|recordaba|nunca quiso",
             C="una bicicleta azul|el jardín junto al lago|siete manzanas amarillas|la ventana abierta|una carta larga|una máquina extraña|"
               "pan caliente|el cuadro de un barco|la música de su tierra|un mapa de las montañas|el diario de la tarde",
             D="por la mañana|después de la lluvia|antes del desayuno|camino de la escuela|el verano pasado|todos los días|"
               "en la estación|anoche",
             E="buenas noches|muchas gracias|qué voz tan bonita|bueno, quizás|es maravilloso|no, hoy no|perdón|cómo está usted")),
    "pt-br": (
        "A B C.|D, A B C.|A B C D.|E!|E.|E, A B C.|O número é N, não N.|Contamos N pássaros.|A B C, e A B C.|É verdade que A B C?",
        dict(A="minha irmã|o velho professor|nosso vizinho|uma jovem pintora|a médica|o irmão dela|o piloto|um menino pequeno|"
               "toda a família",
             B="encontrou|comprou|esqueceu|procurava|queria ver|desenhou|lembrava|nunca quis",
             C="uma bicicleta azul|o jardim perto do lago|sete maçãs amarelas|a janela aberta|uma carta longa|"
               "uma máquina estranha|pão quente|"
               "a pintura de um barco|a música da sua terra|um mapa das montanhas|o jornal da tarde",
             D="de manhã|depois da chuva|antes do café|no caminho da escola|no verão passado|todos os dias|na estação|ontem à noite",
             E="boa noite|muito obrigado|que voz bonita|bem, talvez|é maravilhoso|não, hoje não|desculpe|como vai você")),
    "hi": (
        "A C B।|D A C B।|A D C B।|E!|E।|E, A C B।|नंबर N है।|हमने N चिड़ियाँ गिनीं।|A C B, और A C B।|क्या A C B?",
        dict(A="मेरी बहन ने|बूढ़े गुरु ने|हमारे पड़ोसी ने|डॉक्टर ने|उसके भाई ने|एक छोटे लड़के ने|माँ ने|पूरे परिवार ने",
             B="देखा|लिया|पाया|माँगा|दिया|रखा|भेजा|छोड़ा",
             C="नीला फूल|झील के पास का बगीचा|पीला आम|खुला दरवाज़ा|लंबा खत|अजीब सामान|गरम खाना|नाव का चित्र|पहाड़ों का नक्शा|शाम का अखबार",
             D="आज सुबह|बारिश के बाद|नाश्ते से पहले|पिछली गर्मियों में|हर दिन|स्टेशन पर|कल शाम को",
             E="नमस्ते|बहुत धन्यवाद|कितनी सुंदर आवाज़|शायद|यह बहुत अच्छा है|नहीं, आज नहीं|माफ़ कीजिए|आप कैसे हैं")),
    "ru": (
        "A B C.|D A B C.|A B C D.|E!|E.|E, A B C.|Номер N, а не N.|Мы видели N птиц.|A B C, и A B C.|Правда, что A B C?",
        dict(A="мой брат|старый учитель|наш сосед|молодой художник|врач|её дядя|лётчик|маленький мальчик|весёлый студент",
             B="нашёл|купил|забыл|искал|хотел видеть|нарисовал|подарил|вспомнил|не любил",
             C="синий велосипед|сад у озера|семь жёлтых яблок|открытое окно|длинное письмо|странный прибор|тёплый хлеб|рисунок корабля|"
               "карту этих гор|вечернюю газету|музыку своей страны",
             D="утром|после дождя|перед завтраком|по дороге в школу|прошлым летом|каждый день|на вокзале|вчера вечером",
             E="добрый вечер|большое спасибо|какой красивый голос|ну, может быть|это чудесно|нет, не сегодня|извините|как дела")),
    "it": (
        "A B C.|D, A B C.|A B C D.|E!|E.|E, A B C.|Il numero è N, non N.|Abbiamo contato N uccelli.|A B C, e A B C.|È vero che A B C?",
        dict(A="mia sorella|il vecchio maestro|il nostro vicino|una giovane pittrice|la dottoressa|suo fratello|il pilota|"
               "un bambino|la famiglia",
             B="trovò|comprò|cercava|voleva vedere|ha disegnato|ha dimenticato|ricordava|non amava",
             C="una bicicletta blu|il giardino vicino al lago|sette mele gialle|la finestra aperta|una lunga lettera|una strana macchina|"
               "pane caldo|il quadro di una nave|la musica di casa|una mappa delle montagne|il giornale della sera",
             D="di mattina|dopo la pioggia|prima di colazione|andando a scuola|l'estate scorsa|tutti i giorni|alla stazione|ieri sera",
             E="buona sera|grazie mille|che bella voce|beh, forse|è meraviglioso|no, oggi no|mi scusi|come sta"))}
WEIGHTS = {"cmn-latn-pinyin": 3, "ja": 3, "en-us": 3}      # how often a language is spoken in train; the others 2, accents of English 1


def sentence(language, rng, held_out=False):
    """One sentence of a language that is (or is not) among the held-out ones. rng a random.Random"""
    templates, lists = TEXTS[language]

    def word(slot):
        return str(rng.randint(2, 999)) if slot[0] == "N" else rng.choice(lists[slot[0]].split("|"))

    while True:
        text = re.sub(r"\b[A-FN]\b", word, rng.choice(templates.split("|")))
        text = text[0].upper() + text[1:]
        if is_held_out(text) == held_out:
            return text


def is_held_out(text):
    """By its words alone: a question and an exclamation of the same words are on the same side."""
    return zlib.crc32(" ".join(re.findall(r"\w+", text.lower())).encode()) % 8 == 0


# ---- text -> sound --------------------------------------------------------------------------------------------------------------------

def speak(text, language, voice, speed, pitch):
    """espeak-ng: text -> (samples,) float32 at 16 kHz.

    speed  words a minute, 80 to 450        pitch  0 to 99
    raises ValueError if the program is not installed, OSError with its last line if it fails
    """
    command = ["espeak-ng", "-b", "1", "-v", f"{language}+{voice}", "-s", str(speed), "-p", str(pitch), "-z", "--stdin", "--stdout"]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True)
    except FileNotFoundError:
        raise ValueError(INSTALL) from None
    if done.returncode or len(done.stdout) < 1000:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no sound came"]
        raise OSError(f"espeak-ng failed on {text!r}: {said[-1]}")
    wav, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    return soxr.resample(wav, rate, RATE).astype(np.float32)


def speech(language, voice, seconds, rng, held_out=False):
    """At least `seconds` of sentences with pauses between them, one voice -> (samples,) float32, peak 0.2 to 0.9."""
    speed, pitch, parts, length = rng.randint(105, 215), rng.randint(15, 85), [], 0
    while length < seconds * RATE:
        text = sentence(language, rng, held_out)
        part = speak(text, language, voice, speed + rng.randint(-10, 10), min(99, max(0, pitch + rng.randint(-8, 8))))
        parts += [part, np.zeros(int(rng.uniform(*PAUSE) * RATE), np.float32)]
        length += len(parts[-1]) + len(parts[-2])
    wav = np.concatenate(parts)
    return wav * (rng.uniform(0.2, 0.9) / max(np.abs(wav).max(), 1e-6))


def write_ogg(path, wav):
    """(samples,) float32 -> Vorbis, in blocks: libsndfile crashes on very long single writes."""
    with soundfile.SoundFile(path, "w", RATE, 1, format="OGG", subtype="VORBIS", compression_level=COMPRESSION) as file:
        for start in range(0, len(wav), RATE):
            file.write(wav[start:start + RATE])


def make(folder, hours=1.5, seed=0):
    """Write folder/train with about `hours` of speech, and folder/held_out.

    returns  (seconds of train, seconds of held_out)
    raises   ValueError if espeak-ng is missing, the folder holds sound already or hours is not positive
    """
    folder, rng = Path(folder), random.Random(seed)
    if not hours > 0:
        raise ValueError(f"wanted hours above 0, got {hours}")
    if any(folder.glob("*/*.ogg")):
        raise ValueError(f"{folder} holds sound already: delete it or name another folder")
    speak("hello", "en-us", "m1", 150, 50)                               # before any folder is made
    languages = [name for name in TEXTS if name != HELD_OUT_LANGUAGE]
    weights = [WEIGHTS.get(name, 1 if name.startswith("en-gb") else 2) for name in languages]
    seconds = []
    (folder / "train").mkdir(parents=True, exist_ok=True)
    while sum(seconds) < hours * 3600:
        language = rng.choices(languages, weights)[0] if len(seconds) >= len(languages) else languages[len(seconds)]
        voice = VOICES[len(seconds) % len(VOICES)]
        wav = speech(language, voice, rng.uniform(20, 52), rng)
        write_ogg(folder / "train" / f"{language}_{voice}_{len(seconds):03d}.ogg", wav)
        seconds.append(len(wav) / RATE)
        print(f"\r{len(seconds)} files, {sum(seconds) / 60:.1f} of {hours * 60:.1f} minutes", end="", flush=True)
    print()
    return sum(seconds), make_held_out(folder / "held_out", random.Random(f"held out {seed}"), languages)


def make_held_out(folder, rng, languages):
    """The files that are never trained on -> their seconds together"""
    folder.mkdir(exist_ok=True)
    total = 0.0
    for k in range(HELD_OUT_FILES):
        language = HELD_OUT_LANGUAGE if k % 4 == 0 else languages[(k - k // 4 - 1) % len(languages)]
        voice = HELD_OUT_VOICES[k % len(HELD_OUT_VOICES) - k // len(HELD_OUT_VOICES)]     # shifts, so that voices meet several languages
        wav = speech(language, voice, 51 if k >= HELD_OUT_FILES - LONG_FILES else 20, rng, held_out=True)
        write_ogg(folder / f"{language}_{voice}_{k:03d}.ogg", wav)
        total += len(wav) / RATE
    return total


# ---- training: crops and augmentation -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Speech:
    """The files of a folder end to end: file i is samples[starts[i]:starts[i + 1]]."""
    samples: torch.Tensor        # (all,) int16 at 16 kHz
    starts: torch.Tensor         # (files + 1,) int64


def load_folder(folder, device="cpu"):
    """All sound files of a folder -> Speech on the device: 115 MB an hour.  raises ValueError if there are none"""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".ogg", ".wav", ".flac", ".mp3", ".opus"))
    if not paths:
        raise ValueError(f"wanted a folder with sound files, got {folder} with none: python -m tiny.speech makes one")
    wavs = [(load_audio(path) * 32767).round().clamp(-32768, 32767).to(torch.int16) for path in paths]
    lengths = torch.tensor([0] + [len(wav) for wav in wavs])
    return Speech(torch.cat(wavs).to(device), lengths.cumsum(0).to(device))


def crops(sound, n, seconds, generator=None):
    """n random pieces, each from one file; every place that fits is as likely as any other.

    sound    Speech        generator  torch.Generator on its device
    returns  (n, samples) float32 in [-1, 1], samples = round(seconds * 16000)
    raises   ValueError if no file is that long
    """
    length, device = round(seconds * RATE), sound.samples.device
    places = (sound.starts.diff() - length + 1).clamp_min(0)             # (files,) ways to cut each
    ends = places.cumsum(0)
    if not ends[-1] > 0:
        longest = sound.starts.diff().max().item() / RATE
        raise ValueError(f"wanted pieces of {seconds:g} s, the longest file has {longest:.1f} s: ask for shorter ones")
    place = (torch.rand(n, generator=generator, device=device, dtype=torch.float64) * ends[-1]).long()      # (n,)
    file = torch.searchsorted(ends, place, right=True)
    start = sound.starts[file] + place - (ends - places)[file]
    return sound.samples[start[:, None] + torch.arange(length, device=device)] / 32768.0


def rand(generator, device, *shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(shape, generator=generator, device=device)


def resample(wav, rate, start):
    """Read each row faster (rate > 1, higher and shorter) or slower, round and round from `start`. wav (n, samples), rate, start (n,)"""
    samples = wav.shape[1]
    at = (start.double()[:, None] + rate.double()[:, None] * torch.arange(samples, device=wav.device)) % samples    # float64: to a fraction of a sample
    first = at.floor().long().clamp_max(samples - 1)
    x = (at - first).float()
    p0, p1, p2, p3 = (wav.gather(1, (first + k) % samples) for k in (-1, 0, 1, 2))
    return p1 + 0.5 * x * (p2 - p0 + x * (2 * p0 - 5 * p1 + 4 * p2 - p3 + x * (3 * (p1 - p2) + p3 - p0)))             # Catmull-Rom


def shape_spectrum(wav, gains):
    """Filter each row by gains in dB, linear in log frequency from 60 Hz to 8 kHz. wav (n, samples), gains (n, knots)"""
    samples, knots = wav.shape[1], gains.shape[1]
    hz = torch.fft.rfftfreq(samples, 1 / RATE, device=wav.device)
    at = ((hz.clamp_min(60.0) / 60.0).log2() / np.log2(8000 / 60)).clamp(0, 1) * (knots - 1)
    low = at.floor().long().clamp_max(knots - 2)
    decibel = torch.lerp(gains[:, low], gains[:, low + 1], at - low)     # (n, frequencies)
    return torch.fft.irfft(torch.fft.rfft(wav) * 10 ** (decibel / 20), n=samples)


def rms(wav):
    """Root mean square of each row (n, 1), never 0."""
    return wav.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-5)


def noise(n, samples, generator, device):
    """(n, samples) white to brown noise, or between, of rms 1."""
    white = torch.randn(n, samples, generator=generator, device=device)
    slope = rand(generator, device, n, 1, high=-42.0)                    # dB from 60 Hz to 8 kHz: 0 white, -21 pink, -42 brown
    coloured = shape_spectrum(white, slope * torch.linspace(0, 1, 2, device=device))
    return coloured / rms(coloured)


def tones(n, samples, generator, device):
    """(n, samples) chords of three voices with four overtones, 1 to 5 a second, each fading; every fifth a rest. rms 1."""
    t = torch.arange(samples, device=device) / RATE
    beat = t * rand(generator, device, n, 1, low=1.0, high=5.0)          # (n, samples)
    index, phase = beat.long(), beat % 1.0
    chords = int(samples / RATE * 5) + 1
    pitch = torch.randint(0, 30, (n, 3, chords), generator=generator, device=device)
    hz = 110.0 * 2.0 ** (pitch / 12)                                     # 110 to 590 Hz
    play = (rand(generator, device, n, chords) > 0.2).float().gather(1, index)
    bright = rand(generator, device, n, 1, low=0.1, high=0.8)
    sound = torch.zeros(n, samples, device=device)
    for voice in range(3):
        turns = (hz[:, voice].gather(1, index).double() / RATE).cumsum(1)     # phase goes on over the chords: no clicks
        for k in range(1, 5):
            sound += bright ** (k - 1) * torch.sin(2 * torch.pi * (k * turns % 1.0)).float()
    fade = torch.exp(-phase * rand(generator, device, n, 1, high=5.0))
    sound = sound * play * fade * (phase / 0.03).clamp(0, 1) * ((1 - phase) / 0.03).clamp(0, 1)
    return sound / rms(sound)


def gaps(n, samples, generator, device, most=3):
    """(n, samples) of 1, with up to `most` gaps of 0, 0.1 to 1.2 s long; edges of 10 ms."""
    t = torch.arange(samples, device=device) / RATE
    keep = torch.ones(n, samples, device=device)
    for _ in range(most):
        centre = rand(generator, device, n, 1, high=samples / RATE)
        half = rand(generator, device, n, 1, low=0.05, high=0.6) * (rand(generator, device, n, 1) < 0.4)
        keep *= (((t - centre).abs() - half) / 0.01).clamp(0, 1)
    return keep


def augment(wav, generator=None):
    """Vary a batch of speech at random, so that no sound is trained on twice.

    wav      (n, samples) float32 at 16 kHz        generator  torch.Generator on its device
    returns  the same shape, in [-1, 1]: speed and pitch x 0.85 to 1.2 (read round and round), each octave louder or softer by some dB,
             gaps of silence in half, noise at 10 to 40 dB in half, level down to -40 dB. 6% are no speech: 2% silence, 2% noise, 2% chords.
    """
    (n, samples), device = wav.shape, wav.device
    rate = rand(generator, device, n, low=np.log(0.85), high=np.log(1.2)).exp()
    wav = resample(wav, rate, rand(generator, device, n) * samples)
    gains = torch.randn(n, 8, generator=generator, device=device) * 3.0 + \
        torch.randn(n, 1, generator=generator, device=device) * 6.0 * torch.linspace(-1, 1, 8, device=device)
    wav = shape_spectrum(wav, gains.clamp(-15, 15))
    wav = torch.where(rand(generator, device, n, 1) < 0.5, wav * gaps(n, samples, generator, device), wav)
    decibel = torch.where(rand(generator, device, n, 1) < 0.5, rand(generator, device, n, 1, low=10.0, high=40.0), torch.inf)
    hiss = noise(n, samples, generator, device)
    wav = torch.where(decibel < 100, wav + hiss * rms(wav) * 10 ** (-decibel / 20), wav)
    kind = rand(generator, device, n, 1)
    wav = torch.where(kind < 0.02, 0.0, torch.where(kind < 0.04, hiss, wav))
    if (rows := ((kind >= 0.04) & (kind < 0.06)).flatten().nonzero().flatten()).numel():
        wav[rows] = tones(len(rows), samples, generator, device)
    loud = 10 ** rand(generator, device, n, 1, low=-2.0, high=-0.1)      # of the highest peak
    return wav * (loud / wav.abs().amax(dim=1, keepdim=True).clamp_min(1e-5))


def main(argv=None):
    any_terminal()
    p = argparse.ArgumentParser(description="Make training speech with espeak-ng.")
    p.add_argument("folder", help="gets train/ and held_out/")
    p.add_argument("--hours", type=float, default=1.5, help="of training sound (default: 1.5)")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = p.parse_args(argv)
    try:
        train, held_out = make(args.folder, args.hours, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in Path(args.folder).glob("*/*.ogg"))
    print(f"wrote {args.folder}: train {train / 3600:.2f} h, held_out {held_out / 3600:.2f} h, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
