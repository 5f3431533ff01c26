"""Eight tables of short facts that a small text model mostly knows: the task of the example.

A row is a thing and the one word, or name, that answers every phrasing about it. Answers are compared by the project's
rules: a response counts if it has the answer as a whole word in a clause that does not deny it.

What it simplifies: one accepted answer a row, so rows with several good answers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Facts of one kind.

    Attributes:
        name: of the table; part of the questions' ids.
        phrasings: with {} for the thing.
        answers: by thing, in the table's order.
        noun: with {} for the thing: what it is called in a sentence about several things.
    """

    name: str
    phrasings: tuple[str, ...]
    answers: dict[str, str]
    noun: str = "{}"


def _pairs(text: str) -> dict[str, str]:
    """Read "thing: answer, thing: answer"."""
    return {thing.strip(): answer.strip() for thing, _, answer in (item.partition(":") for item in text.split(","))}


def _by_answer(text: str) -> dict[str, str]:
    """Read "answer: thing thing; answer: thing", things with spaces written with underscores."""
    groups = (group.partition(":") for group in text.split(";"))
    return {thing.replace("_", " "): answer.strip() for answer, _, things in groups for thing in things.split()}


TABLES = (
    Table(
        "capital",
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Tell me the capital city of {}.",
            "Can you name the capital of {}?",
            "Please name the capital of {}.",
        ),
        _pairs(
            "France: Paris, Spain: Madrid, Italy: Rome, Germany: Berlin, Japan: Tokyo, China: Beijing, Russia: "
            "Moscow, Egypt: Cairo, Greece: Athens, Norway: Oslo, Sweden: Stockholm, Denmark: Copenhagen, Finland: "
            "Helsinki, Poland: Warsaw, Austria: Vienna, Hungary: Budapest, Portugal: Lisbon, Ireland: Dublin, "
            "England: London, Scotland: Edinburgh, Canada: Ottawa, Cuba: Havana, Brazil: Brasilia, Argentina: Buenos "
            "Aires, Chile: Santiago, Peru: Lima, Colombia: Bogota, Venezuela: Caracas, Ecuador: Quito, Thailand: "
            "Bangkok, Vietnam: Hanoi, Turkey: Ankara, Iran: Tehran, Iraq: Baghdad, Syria: Damascus, Kenya: Nairobi, "
            "Ethiopia: Addis Ababa, Nigeria: Abuja, Ghana: Accra, Australia: Canberra, Belgium: Brussels, Romania: "
            "Bucharest, Bulgaria: Sofia, Serbia: Belgrade, Croatia: Zagreb, Iceland: Reykjavik, Indonesia: Jakarta, "
            "the Philippines: Manila, Nepal: Kathmandu, Pakistan: Islamabad, Lebanon: Beirut, Jordan: Amman, "
            "Morocco: Rabat, Algeria: Algiers, Tunisia: Tunis, Jamaica: Kingston, Mongolia: Ulaanbaatar"
        ),
    ),
    Table(
        "country",
        (
            "In which country is {}?",
            "Which country is the city of {} in?",
            "Tell me the country where {} is located.",
            "What country does the city of {} belong to?",
            "Can you tell me in which country {} lies?",
        ),
        _by_answer(
            "France: Lyon Marseille Toulouse Bordeaux; Germany: Hamburg Munich Frankfurt Dresden; Italy: Milan "
            "Naples Venice Florence Turin; Spain: Barcelona Seville Valencia; Japan: Osaka Kyoto Hiroshima; China: "
            "Shanghai Shenzhen Wuhan; India: Mumbai Calcutta Chennai; Brazil: Sao_Paulo Recife; Canada: Toronto "
            "Montreal Vancouver Calgary; Australia: Sydney Melbourne Brisbane Perth; England: Manchester Liverpool "
            "Birmingham; Turkey: Istanbul Izmir; Switzerland: Zurich Geneva Basel; Poland: Krakow Gdansk; Portugal: "
            "Porto; Mexico: Guadalajara Cancun; Russia: Vladivostok; Netherlands: Rotterdam Utrecht; Belgium: "
            "Antwerp Bruges; Egypt: Alexandria; Pakistan: Karachi Lahore; Ireland: Cork; Scotland: Glasgow; Israel: "
            "Haifa; South Africa: Johannesburg Durban"
        ),
    ),
    Table(
        "continent",
        (
            "Which continent is {} in?",
            "On which continent is {}?",
            "What continent does {} belong to?",
            "Tell me the continent where {} is located.",
            "Can you name the continent of {}?",
        ),
        _by_answer(
            "Europe: France Spain Italy Germany Greece Norway Sweden Denmark Finland Poland Austria Hungary Portugal "
            "Ireland Belgium Switzerland Ukraine Romania Bulgaria Serbia; Asia: Japan China India Thailand Vietnam "
            "Iran Iraq Syria Indonesia Malaysia Nepal Pakistan Mongolia Korea; Africa: Egypt Kenya Ethiopia Nigeria "
            "Ghana Morocco Algeria Tunisia Zambia Uganda; South America: Brazil Argentina Chile Peru Colombia "
            "Bolivia; North America: Canada Mexico Cuba"
        ),
    ),
    Table(
        "language",
        (
            "What language do people speak in {}?",
            "Which language is spoken in {}?",
            "What is the official language of {}?",
            "Tell me the main language of {}.",
            "Can you tell me what people in {} speak?",
        ),
        _by_answer(
            "French: France; Spanish: Spain Mexico Cuba Argentina Chile Colombia Peru; Italian: Italy; German: "
            "Germany Austria; Japanese: Japan; Russian: Russia; Arabic: Egypt Iraq Syria Morocco Algeria Jordan; "
            "Greek: Greece; Norwegian: Norway; Swedish: Sweden; Danish: Denmark; Finnish: Finland; Polish: Poland; "
            "Hungarian: Hungary; Portuguese: Portugal Brazil; English: England Australia; Thai: Thailand; "
            "Vietnamese: Vietnam; Turkish: Turkey; Persian: Iran; Ukrainian: Ukraine; Romanian: Romania; Bulgarian: "
            "Bulgaria; Croatian: Croatia; Serbian: Serbia; Icelandic: Iceland; Hebrew: Israel; Nepali: Nepal; "
            "Korean: Korea; Mongolian: Mongolia"
        ),
    ),
    Table(
        "opposite",
        (
            "What is the opposite of {}?",
            "What is the opposite of the word {}?",
            "Tell me the opposite of {}.",
            "Give me an antonym for {}.",
            "Which word means the opposite of {}?",
        ),
        _pairs(
            "hot: cold, up: down, left: right, black: white, day: night, fast: slow, rich: poor, tall: short, "
            "strong: weak, empty: full, early: late, wet: dry, clean: dirty, near: far, thick: thin, cheap: "
            "expensive, love: hate, win: lose, buy: sell, true: false, good: bad, inside: outside, high: low, wide: "
            "narrow, smooth: rough, push: pull, war: peace, success: failure, summer: winter, north: south, east: "
            "west, friend: enemy, remember: forget, ancient: modern, always: never, add: subtract, alive: dead, "
            "accept: reject, arrive: depart, begin: end, light: dark, happy: sad, deep: shallow, question: answer, "
            "everything: nothing, first: last, top: bottom, front: back, before: after, maximum: minimum, positive: "
            "negative, male: female, sunrise: sunset, import: export, borrow: lend"
        ),
    ),
    Table(
        "symbol",
        (
            "What is the chemical symbol for {}?",
            "What is the symbol of the element {}?",
            "Tell me the chemical symbol of {}.",
            "Which chemical symbol does {} have?",
            "Give me the symbol for the element {}.",
        ),
        _pairs(
            "hydrogen: H, oxygen: O, carbon: C, nitrogen: N, gold: Au, silver: Ag, iron: Fe, copper: Cu, sodium: Na, "
            "potassium: K, calcium: Ca, lead: Pb, zinc: Zn, tin: Sn, mercury: Hg, sulfur: S, chlorine: Cl, aluminum: "
            "Al, silicon: Si, neon: Ne, uranium: U, magnesium: Mg, nickel: Ni"
        ),
    ),
    Table(
        "author",
        (
            "Who wrote {}?",
            "Who is the author of {}?",
            "Tell me who wrote {}.",
            "Which author wrote {}?",
            "Can you name the author of {}?",
        ),
        {
            "Hamlet": "Shakespeare",
            "Romeo and Juliet": "Shakespeare",
            "Macbeth": "Shakespeare",
            "Harry Potter": "Rowling",
            "Pride and Prejudice": "Austen",
            "Oliver Twist": "Dickens",
            "A Christmas Carol": "Dickens",
            "Moby Dick": "Melville",
            "War and Peace": "Tolstoy",
            "Anna Karenina": "Tolstoy",
            "Animal Farm": "Orwell",
            "The Hobbit": "Tolkien",
            "The Lord of the Rings": "Tolkien",
            "Frankenstein": "Shelley",
            "Dracula": "Stoker",
            "The Great Gatsby": "Fitzgerald",
            "Don Quixote": "Cervantes",
            "The Odyssey": "Homer",
            "The Iliad": "Homer",
            "Robinson Crusoe": "Defoe",
            "Treasure Island": "Stevenson",
            "Sense and Sensibility": "Austen",
            "The Adventures of Tom Sawyer": "Twain",
            "Crime and Punishment": "Dostoevsky",
        },
    ),
    Table(
        "job",
        (
            "What do you call a person who {}?",
            "What is the name for someone who {}?",
            "Tell me the job of a person who {}.",
            "What is the profession of someone who {}?",
            "Which worker {}?",
        ),
        _pairs(
            "bakes bread: baker, teaches children: teacher, flies airplanes: pilot, grows crops: farmer, catches "
            "fish: fisherman, sells meat: butcher, repairs pipes: plumber, treats teeth: dentist, puts out fires: "
            "firefighter, repairs cars: mechanic, travels into space: astronaut, takes photographs: photographer, "
            "plays music: musician, takes care of plants: gardener, designs buildings: architect, cooks in a "
            "restaurant: chef, cuts hair: barber, sells flowers: florist, digs for coal: miner, makes clothes: "
            "tailor, sails ships: sailor, paints pictures: painter, treats sick animals: veterinarian, installs "
            "electric wires: electrician, lends books: librarian, plays in movies: actor, studies the stars: "
            "astronomer, delivers letters: mailman, serves food in a restaurant: waiter, writes poems: poet"
        ),
        noun="someone who {}",
    ),
)
